"""The tables that families share: Hugging Face's names, and llama.cpp's by the parts a layer is made of."""

# --- Hugging Face: its own names, the routed experts one by one -------------------------------------------------------
DECODER = {
    "lm_head.{rest}": "lm_head.{rest}",
    "layers.{n}.mlp.experts.gate_up_proj[gate of {e}]": "model.layers.{n}.mlp.experts.{e}.gate_proj.weight",
    "layers.{n}.mlp.experts.gate_up_proj[up of {e}]": "model.layers.{n}.mlp.experts.{e}.up_proj.weight",
    "layers.{n}.mlp.experts.down_proj[{e}]": "model.layers.{n}.mlp.experts.{e}.down_proj.weight",
    "{rest}": "model.{rest}",
}

# --- GGUF -------------------------------------------------------------------------------------------------------------
EMBEDDINGS = {
    "embed_tokens.{rest}": "token_embd.{rest}",
    "norm.{rest}": "output_norm.{rest}",
    "lm_head.{rest}": "output.{rest}",
}
NORMS = {
    "layers.{n}.input_layernorm.{rest}": "blk.{n}.attn_norm.{rest}",
    "layers.{n}.post_attention_layernorm.{rest}": "blk.{n}.ffn_norm.{rest}",
}
# llama.cpp rotates neighbouring features in some architectures and the halves of a head in the others. [paired] rows
# are those of neighbours, whatever they are in memory.
GQA_OF_HALVES = {
    "layers.{n}.self_attn.q_proj.{rest}": "blk.{n}.attn_q.{rest}",
    "layers.{n}.self_attn.k_proj.{rest}": "blk.{n}.attn_k.{rest}",
    "layers.{n}.self_attn.v_proj.{rest}": "blk.{n}.attn_v.{rest}",
    "layers.{n}.self_attn.o_proj.{rest}": "blk.{n}.attn_output.{rest}",
    "layers.{n}.self_attn.q_norm.{rest}": "blk.{n}.attn_q_norm.{rest}",
    "layers.{n}.self_attn.k_norm.{rest}": "blk.{n}.attn_k_norm.{rest}",
}
GQA_OF_NEIGHBOURS = {
    "layers.{n}.self_attn.q_proj.{rest}[paired]": "blk.{n}.attn_q.{rest}",
    "layers.{n}.self_attn.k_proj.{rest}[paired]": "blk.{n}.attn_k.{rest}",
    "layers.{n}.self_attn.v_proj.{rest}": "blk.{n}.attn_v.{rest}",
    "layers.{n}.self_attn.o_proj.{rest}": "blk.{n}.attn_output.{rest}",
}
MLA = {
    "layers.{n}.self_attn.q_proj.{rest}[paired]": "blk.{n}.attn_q.{rest}",
    "layers.{n}.self_attn.q_a_proj.{rest}": "blk.{n}.attn_q_a.{rest}",
    "layers.{n}.self_attn.q_a_layernorm.{rest}": "blk.{n}.attn_q_a_norm.{rest}",
    "layers.{n}.self_attn.q_b_proj.{rest}[paired]": "blk.{n}.attn_q_b.{rest}",
    "layers.{n}.self_attn.kv_a_proj_with_mqa.{rest}[paired]": "blk.{n}.attn_kv_a_mqa.{rest}",
    "layers.{n}.self_attn.kv_a_layernorm.{rest}": "blk.{n}.attn_kv_a_norm.{rest}",
    "layers.{n}.self_attn.kv_b_proj.{rest}[keys]": "blk.{n}.attn_k_b.{rest}",
    "layers.{n}.self_attn.kv_b_proj.{rest}[values]": "blk.{n}.attn_v_b.{rest}",
    "layers.{n}.self_attn.o_proj.{rest}": "blk.{n}.attn_output.{rest}",
}
MLA_BEFORE_ABSORPTION = {"layers.{n}.self_attn.kv_b_proj.{rest}": "blk.{n}.attn_kv_b.{rest}"}
DENSE = {
    "layers.{n}.mlp.gate_proj.{rest}": "blk.{n}.ffn_gate.{rest}",
    "layers.{n}.mlp.up_proj.{rest}": "blk.{n}.ffn_up.{rest}",
    "layers.{n}.mlp.down_proj.{rest}": "blk.{n}.ffn_down.{rest}",
}
MOE = {
    "layers.{n}.mlp.gate.weight": "blk.{n}.ffn_gate_inp.weight",
    "layers.{n}.mlp.gate.e_score_correction_bias": "blk.{n}.exp_probs_b.bias",
    "layers.{n}.mlp.experts.gate_up_proj[gate]": "blk.{n}.ffn_gate_exps.weight",
    "layers.{n}.mlp.experts.gate_up_proj[up]": "blk.{n}.ffn_up_exps.weight",
    "layers.{n}.mlp.experts.down_proj": "blk.{n}.ffn_down_exps.weight",
    "layers.{n}.mlp.shared_experts.gate_proj.{rest}": "blk.{n}.ffn_gate_shexp.{rest}",
    "layers.{n}.mlp.shared_experts.up_proj.{rest}": "blk.{n}.ffn_up_shexp.{rest}",
    "layers.{n}.mlp.shared_experts.down_proj.{rest}": "blk.{n}.ffn_down_shexp.{rest}",
}
MTP = {
    "layers.{n}.enorm.{rest}": "blk.{n}.nextn.enorm.{rest}",
    "layers.{n}.hnorm.{rest}": "blk.{n}.nextn.hnorm.{rest}",
    "layers.{n}.eh_proj.{rest}": "blk.{n}.nextn.eh_proj.{rest}",
    "layers.{n}.shared_head.norm.{rest}": "blk.{n}.nextn.shared_head_norm.{rest}",
}

# --- the architectures of llama.cpp, out of these parts ---------------------------------------------------------------
LLAMA = EMBEDDINGS | NORMS | GQA_OF_NEIGHBOURS | DENSE
QWEN = EMBEDDINGS | NORMS | GQA_OF_HALVES | DENSE
DEEPSEEK = LLAMA | MOE
DEEPSEEK2 = EMBEDDINGS | NORMS | MLA | DENSE | MOE | MTP
