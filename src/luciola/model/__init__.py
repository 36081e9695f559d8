"""One Transformer for the whole DeepSeek family: MLA or GQA attention, SwiGLU or DeepSeekMoE feed-forward, MTP
heads."""
