"""Decoding kernels in plain C for the CPU, each beside the PyTorch formula that it must agree with.

A decoding step handles few tokens: its arithmetic is small, and what it costs is reading weights once and starting
operations many times. The kernels here do a layer's work in a handful of calls. They are compiled once per machine with
the C compiler that is there (`build`); where none is, or on another device, the PyTorch formulas run instead.
"""
