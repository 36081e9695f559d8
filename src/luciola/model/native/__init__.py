"""Kernels in plain C for the CPU, each beside the PyTorch formula that it must agree with.

A decoding step handles few tokens: its arithmetic is small, and what it costs is reading weights once and starting
operations many times. The kernels here do a layer's work in a handful of calls. In training the products are PyTorch's;
what stands between them, attention included (`causal`, `pointwise`), costs as much there as they do, for its memory
traffic, and takes one pass here. All are compiled once per machine with the C compiler that is there (`build`); where
none is, or on another device, the PyTorch formulas run instead.
"""
