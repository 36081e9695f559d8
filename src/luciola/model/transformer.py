"""The Transformer: embedding, L pre-norm blocks, a norm, a head, and D multi-token prediction modules.

    x = x + Attention(RMSNorm(x));   x = x + FeedForward(RMSNorm(x))

Parameter names are Hugging Face's without the leading "model." so that a checkpoint reads like this file.

Shapes: B batch, T time, N new tokens of any sequences, P slots of the cache, C numbers in each, D hidden, V vocabulary,
K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luciola.model.attention import Context, Extend, PromptCache
from luciola.model.config import ModelConfig
from luciola.model.gqa import GQA
from luciola.model.joined import weight_of
from luciola.model.layout import Layout
from luciola.model.mla import MLA
from luciola.model.mlp import SwiGLU
from luciola.model.moe import MoE, Routing
from luciola.model.mtp import MTPModule, MTPStates
from luciola.model.native.attention import Step
from luciola.model.native.ends import embed, normed
from luciola.model.native.experts import moe
from luciola.model.native.linear import Product
from luciola.model.norm import RMSNorm
from luciola.model.rope import Rope, Rotation


class Block(nn.Module):
    """One layer; its feed-forward is a mixture of experts from `first_k_dense_replace` on."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: MLA | GQA = MLA(config) if config.is_mla else GQA(config, config.window(layer))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if config.is_moe_layer(layer):
            self.mlp = MoE(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def _feed_forward(self, x_BTD: Tensor, routes_BTK: Tensor | None) -> tuple[Tensor, Routing | None]:
        y_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            z_BTD, routing = self.mlp(y_BTD, routes_BTK)
            return x_BTD + z_BTD, routing
        return x_BTD + self.mlp(y_BTD), None

    def forward(
        self, x_BTD: Tensor, context: Context, extend: Extend | None = None, routes_BTK: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Whole sequences. Returns the new hidden states and, from an MoE layer, its routing."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context, extend)
        return self._feed_forward(x_BTD, routes_BTK)

    def prepare(self) -> None:
        """Make ready for `decode`."""
        self.self_attn.prepare(self.input_layernorm)
        if not isinstance(self.mlp, MoE):
            self.mlp.prepare(self.post_attention_layernorm)

    def decode(self, x_ND: Tensor, step: Step, pool_PC: Tensor, exact: bool = False) -> tuple[Tensor, Routing | None]:
        """N new tokens, each against the cache of its sequence."""
        x_ND = self.self_attn.decode(x_ND, step, pool_PC, exact)
        if isinstance(self.mlp, MoE):
            x_ND, indices_NK, scores_NE = moe(x_ND, self.mlp, self.post_attention_layernorm)
            return x_ND, Routing(indices_NK, scores_NE)
        return self.mlp.decode(x_ND, exact), None


class Hidden(NamedTuple):
    """What the blocks leave behind: states ready for the head, and the routing of each MoE layer from first to last."""

    states: Tensor
    routings: list[Routing]


class Decoded(NamedTuple):
    """`Hidden` of the tokens of a step, and their logits where these were asked for."""

    states: Tensor
    routings: list[Routing]
    logits: Tensor | None = None


class Transformer(nn.Module):
    """The one model object: trained, sampled from, scored, saved and served.

    `model(tokens_BT)` gives float32 logits (B, T, V). Training and RL call `hidden` and put their own loss on the head;
    the engine calls `hidden` with a cache for prompts and `decode` for each new token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList(
            MTPModule(config, Block(config, config.num_hidden_layers + depth))
            for depth in range(config.num_nextn_predict_layers)
        )
        self.rope = Rope(config)
        self.activation_checkpointing = False

    def initialize(self, seed: int) -> None:
        """Every weight matrix ~ N(0, initializer_range), norms 1, biases 0 (DeepSeek LLM, section 2.2). Same seed, same
        model."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE feed-forwards of the main layers, first to last."""
        return [block.mlp for block in self.layers if isinstance(block.mlp, MoE)]

    @property
    def mtp_moe_layers(self) -> list[MoE]:
        """Those of the multi-token prediction modules."""
        return [module.block.mlp for module in self.mtp if isinstance(module.block.mlp, MoE)]  # type: ignore[union-attr]

    def num_parameters(self, *, active: bool = False) -> int:
        """Weights of the main model (MTP modules not counted); with `active`, only those one token meets."""
        config = self.config
        total = sum(p.numel() for name, p in self.named_parameters() if not name.startswith("mtp."))
        if active and config.n_routed_experts and config.num_experts_per_tok:
            for layer in self.moe_layers:
                routed = sum(p.numel() for p in layer.experts.parameters())
                total -= routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
        return total

    def context(
        self, length: int, segments_BT: Tensor | None = None, layout: Layout | None = None, past: int = 0
    ) -> Context:
        """Angles and mask of rows of `length` tokens that follow `past` others; with `segments_BT` each document counts
        positions from 0, with `layout` each token from the start of its row."""
        device = self.embed_tokens.weight.device
        if layout is not None:
            return Context(self.rope(layout.shape[1], device, layout.positions_1N), layout=layout)
        if segments_BT is None:
            rotation = self.rope(past + length, device)
            return Context(Rotation(rotation.cos[past:], rotation.sin[past:]))
        positions = torch.arange(length, device=device).expand_as(segments_BT)
        starts = torch.ones_like(segments_BT, dtype=torch.bool)
        starts[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        begin = (positions * starts).cummax(dim=1).values
        return Context(self.rope(length, device, positions - begin), begin)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        segments_BT: Tensor | None = None,
        layout: Layout | None = None,
        cache: PromptCache | None = None,
        routes_BTLK: Tensor | None = None,
    ) -> Hidden:
        """Run the blocks over whole sequences.

        Args:
            tokens_BT: int64 token ids, right-padded (later tokens never influence earlier ones).
            segments_BT: document numbers of packed rows; tokens then see their own document only.
            layout: the rows that attention sees, where `tokens_BT` is a flat list (1, N); the states are then flat too.
            cache: holds the past of the rows, and keeps what later tokens will need of these.
            routes_BTLK: experts to replay, one entry an MoE layer (L counts MoE layers).
        """
        x_BTD = self.embed_tokens(tokens_BT)
        context = self.context(tokens_BT.shape[1], segments_BT, layout, 0 if cache is None else cache.past)
        routings: list[Routing] = []
        for layer, block in enumerate(self.layers):
            routes_BTK = None
            if routes_BTLK is not None and isinstance(block.mlp, MoE):
                routes_BTK = routes_BTLK[:, :, len(routings)]
            extend = None if cache is None else partial(cache.extend, layer)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD, routing = checkpoint(block, x_BTD, context, extend, routes_BTK, use_reentrant=False)
            else:
                x_BTD, routing = block(x_BTD, context, extend, routes_BTK)
            if routing is not None:
                routings.append(routing)
        return Hidden(self.norm(x_BTD), routings)

    def prepare(self) -> None:
        """Make ready for `decode`; to be done again when weights have changed. Weights that meet the same input come to
        lie below each other in memory."""
        # Parameters must come out as what they were: fit for training, unless they never were.
        with torch.inference_mode(self.embed_tokens.weight.is_inference()), torch.no_grad():
            for block in [*self.layers, *(module.block for module in self.mtp)]:
                block.prepare()
            for module in self.mtp:
                module.prepare(self.lm_head)  # type: ignore[operator]
            self.head = Product(weight_of(self.lm_head))

    def decode(self, step: Step, pools: Sequence[Tensor], exact: bool = False, logits: bool = False) -> Decoded:
        """The N new tokens of `step`, several of one sequence allowed, against `pools`, the cache of each layer (P, C).

        Gives states (N, D) and, with `logits`, what the head makes of them (N, V), float32. With `exact` no bit of a
        token's result depends on the other tokens of the step. Where steps are repeated, the next one overwrites it.
        """
        name = "logits" if logits else "states"
        return step.run(name, partial(self._decode, step, pools, exact, logits))  # type: ignore[no-any-return]

    def _decode(self, step: Step, pools: Sequence[Tensor], exact: bool, logits: bool) -> Decoded:
        assert step.tokens_N is not None
        x_ND = embed(step.tokens_N, self.embed_tokens.weight)
        routings: list[Routing] = []
        for block, pool_PC in zip(self.layers, pools, strict=False):  # the MTP module's pool comes last
            x_ND, routing = block.decode(x_ND, step, pool_PC, exact)  # type: ignore[operator]
            if routing is not None:
                routings.append(routing)
        states_ND = normed(x_ND, self.norm)
        return Decoded(states_ND, routings, self.head(states_ND, exact=exact) if logits else None)

    @torch.no_grad()
    def exact_logits(self, tokens_BT: Tensor) -> Tensor:
        """`forward` by the kernels of `decode`: float32 logits (B, T, V), each position's the same bit for bit however
        many tokens are computed with it. An engine made with `parity=True` draws from these very numbers.

        The promise needs float32 weights, not quantised, on a CPU, and the native kernels; it holds from one run to the
        next on the same machine, whatever the number of threads. It does not reach to `forward`, which a GEMM computes
        in another order (float32 rounding apart, the same), nor to other processors.

        Raises:
            ValueError: `tokens_BT` is not rows of token ids of this model, or they go beyond its context.
        """
        vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
        whole = isinstance(tokens_BT, Tensor) and tokens_BT.dtype in (torch.int64, torch.int32)
        if not whole or tokens_BT.ndim != 2 or not tokens_BT.numel():
            given = f"{list(tokens_BT.shape)}, {tokens_BT.dtype}" if isinstance(tokens_BT, Tensor) else type(tokens_BT)
            raise ValueError(
                f"tokens_BT={given} must be rows of at least one token id, (B, T) int64; torch.tensor([ids]) makes one"
            )
        B, T = tokens_BT.shape
        if context < T:
            raise ValueError(f"tokens_BT has rows of {T} tokens; the model's context has room for {context}")
        for token in (int(tokens_BT.min()), int(tokens_BT.max())):
            if not 0 <= token < vocabulary:
                raise ValueError(f"tokens_BT has token {token}, outside the vocabulary of {vocabulary}")
        self.prepare()
        device = tokens_BT.device
        shape = (B * T, self.config.cached_per_token_and_layer)
        pools = [torch.zeros(shape, dtype=self.norm.weight.dtype, device=device) for _ in self.layers]
        rows_B, positions_T = (torch.arange(n, dtype=torch.int32, device=device) for n in (B, T))
        rotation = self.rope(T, device)
        table_B1 = rows_B[:, None].clone()  # each row of tokens is a block
        rows_N, positions_N, tokens_N = rows_B.repeat_interleave(T), positions_T.repeat(B), tokens_BT.flatten().long()
        step = Step(rows_N, positions_N, table_B1, T, rotation.cos, rotation.sin, tokens_N=tokens_N)
        logits_NV = self.decode(step, pools, exact=True, logits=True).logits
        assert logits_NV is not None
        return logits_NV.view(B, T, -1)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Float32 logits (B, T, V) of the next token at every position."""
        logits: Tensor = self.lm_head(self.hidden(tokens_BT).states)
        return logits.float()

    def mtp_hidden(
        self, states_BTD: Tensor, tokens_BT: Tensor, depth: int, segments_BT: Tensor | None = None
    ) -> MTPStates:
        """States of MTP module `depth` (0 first), which predict the token depth + 2 ahead (V3 report, section 2.2).

        `states_BTD` are the states of the depth before (the main model's for depth 0); `tokens_BT` the row itself. Row
        i joins state i with token i + depth + 1, so the result has T - depth - 1 columns.
        """
        module = self.mtp[depth]
        length = tokens_BT.shape[1] - depth - 1
        segments = None if segments_BT is None else segments_BT[:, :length]
        embedded_BTD = self.embed_tokens(tokens_BT[:, depth + 1 :])
        return module(states_BTD[:, :length], embedded_BTD, self.context(length, segments))  # type: ignore[no-any-return]

    def mtp_read(self, states_BTD: Tensor, next_BT: Tensor, cache: PromptCache) -> None:
        """Let MTP module 0 keep what `mtp_decode` will need of a prompt: state i with the token that came after it."""
        embedded_BTD = self.embed_tokens(next_BT)
        context = self.context(next_BT.shape[1], past=cache.past)
        self.mtp[0](states_BTD, embedded_BTD, context, partial(cache.extend, len(self.layers)))

    def mtp_decode(self, states_ND: Tensor, step: Step, pool_PC: Tensor, logits: bool = False) -> Tensor:
        """States (N, D) of MTP module 0, which predict the token after those of `step`, from the states of the main
        model before those or, for guesses that reach further, its own; with `logits`, what the head makes of them."""
        name = "mtp logits" if logits else "mtp states"
        return step.run(name, partial(self._mtp_decode, step, pool_PC, logits), states_ND)  # type: ignore[no-any-return]

    def _mtp_decode(self, step: Step, pool_PC: Tensor, logits: bool, states_ND: Tensor) -> Tensor:
        assert step.tokens_N is not None
        module, embedded_ND = self.mtp[0], embed(step.tokens_N, self.embed_tokens.weight)
        states_ND = module.decode(states_ND, embedded_ND, step, pool_PC)  # type: ignore[operator]
        return module.head(states_ND) if logits else states_ND  # type: ignore[operator]
