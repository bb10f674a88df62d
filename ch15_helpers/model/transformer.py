"""The causal GQA transformer that every chapter runs: Llama, Qwen3, Qwen3-MoE and Mixtral.

One forward serves prefill chunks and decodes alike: tokens of all sequences lie side by side in
one flat batch, and a :class:`BatchMetadata` says which pages each of them reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from ch15_helpers.kernels.batch import BatchMetadata
from ch15_helpers.kernels.cpu_layer import CompiledStep, LayerWeights, compiled_step
from ch15_helpers.kernels.linear import linear
from ch15_helpers.kernels.linear_cpu import unpack_weight
from ch15_helpers.kernels.rms_norm import rms_norm
from ch15_helpers.kernels.rope import apply_rope, build_cos_sin_cache, rope_rows
from ch15_helpers.model.config import ModelConfig
from ch15_helpers.model.dense_mlp import DenseMLP
from ch15_helpers.model.moe import MoEBlock
from ch15_helpers.model.paged_attend import PagedAttend

if TYPE_CHECKING:
    from ch15_helpers.model.tokenizer import Tokenizer

# Given q [N, heads, head_dim] and k, v [N, kv_heads, head_dim], returns [N, heads, head_dim].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class DecoderLayer:
    """Attention block and feed-forward block, each behind a norm and added to the residual.

    Attributes:
        qkv_proj: [(heads + 2 * kv_heads) * head_dim, hidden], rows of q, then k, then v.
        o_proj: [hidden, heads * head_dim].
        qkv_bias, o_bias: or None where the architecture has none.
        q_norm, k_norm: [head_dim], per-head norms (Qwen3), or None.
        input_norm, post_attention_norm: [hidden].
        mlp: :class:`DenseMLP` or :class:`MoEBlock`.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        new = partial(torch.empty, device=device, dtype=dtype)
        self.config = config
        hidden, head_dim = config.hidden_size, config.head_dim
        q_dim = config.num_attention_heads * head_dim
        kv_dim = config.num_key_value_heads * head_dim
        self.qkv_proj = new(q_dim + 2 * kv_dim, hidden)
        self.o_proj = new(hidden, q_dim)
        bias = config.attention_bias
        self.qkv_bias = new(q_dim + 2 * kv_dim) if bias else None
        self.o_bias = new(hidden) if bias else None
        self.q_norm = new(head_dim) if config.qk_norm else None
        self.k_norm = new(head_dim) if config.qk_norm else None
        self.input_norm = new(hidden)
        self.post_attention_norm = new(hidden)
        block = MoEBlock if config.is_moe else DenseMLP
        self.mlp: DenseMLP | MoEBlock = block(config, device, dtype)

    def __call__(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin_cache: Tensor,
        attend: Attend,
        rows: tuple[Tensor, Tensor] | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer on a flat batch.

        The residual travels beside the hidden states, so that each addition is fused with the
        norm that follows it.

        Args:
            hidden: [N, hidden], what the previous layer's feed-forward block returned.
            residual: [N, hidden], the residual stream without ``hidden``; None in the first layer.
            positions: int64 [N].
            cos_sin_cache: see :func:`build_cos_sin_cache`.
            attend: writes K and V where they belong and returns the attention's output.
            rows: :func:`rope_rows` of the step, which saves the CPU from gathering them again.
            wanted: tokens (int64) to go on with after attention; None is all.

        Returns:
            (hidden, residual) for the next layer.
        """
        eps = self.config.rms_norm_eps
        if residual is None:
            residual, x = hidden, rms_norm(hidden, self.input_norm, eps)
        else:
            x, residual = rms_norm(hidden, self.input_norm, eps, residual)
        q, k, v = self._project(x)
        if isinstance(attend, PagedAttend):
            mixed = attend.rotated(q, k, v, cos_sin_cache, positions, rows).flatten(1)
        else:
            mixed = attend(*apply_rope(q, k, cos_sin_cache, positions, rows), v).flatten(1)
        if wanted is not None:
            mixed, residual = mixed.index_select(0, wanted), residual.index_select(0, wanted)
        x, residual = rms_norm(
            linear(mixed, self.o_proj, self.o_bias), self.post_attention_norm, eps, residual
        )
        return self.mlp(x), residual

    def compiled_weights(self) -> LayerWeights | None:
        """What :class:`.CompiledStep` runs this layer with, None where it cannot."""
        plain = self.qkv_bias is None and self.o_bias is None and self.q_norm is None
        if not (plain and isinstance(self.mlp, DenseMLP)):
            return None
        mlp = self.mlp
        weights = LayerWeights(
            self.input_norm, self.qkv_proj, self.o_proj,
            self.post_attention_norm, mlp.gate_up_proj, mlp.down_proj,
        )  # fmt: skip
        return weights if weights.compiled else None

    def project_qkv(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin_cache: Tensor,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values of normalised hidden states [N, hidden]."""
        q, k, v = self._project(x)
        return *apply_rope(q, k, cos_sin_cache, positions, rows), v

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = linear(x, self.qkv_proj, self.qkv_bias).view(len(x), -1, self.config.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, self.config.rms_norm_eps)
            k = rms_norm(k, self.k_norm, self.config.rms_norm_eps)
        return q, k, v

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint names below ``model.layers.i.`` and the views that hold them."""
        q_dim = self.config.num_attention_heads * self.config.head_dim
        kv_dim = self.config.num_key_value_heads * self.config.head_dim
        rows = {
            "q": slice(0, q_dim),
            "k": slice(q_dim, q_dim + kv_dim),
            "v": slice(q_dim + kv_dim, None),
        }
        qkv = unpack_weight(self.qkv_proj)
        for letter, part in rows.items():
            yield f"self_attn.{letter}_proj.weight", qkv[part]
        yield "self_attn.o_proj.weight", unpack_weight(self.o_proj)
        if self.qkv_bias is not None and self.o_bias is not None:
            for letter, part in rows.items():
                yield f"self_attn.{letter}_proj.bias", self.qkv_bias[part]
            yield "self_attn.o_proj.bias", self.o_bias
        if self.q_norm is not None and self.k_norm is not None:
            yield "self_attn.q_norm.weight", self.q_norm
            yield "self_attn.k_norm.weight", self.k_norm
        yield "input_layernorm.weight", self.input_norm
        yield "post_attention_layernorm.weight", self.post_attention_norm
        yield from self.mlp.named_weights()


class Transformer:
    """A model with its weights, on one device.

    Attributes:
        config, device, dtype: what it is and where.
        layers: the :class:`DecoderLayer` objects, callable one by one.
        embed_tokens: [vocab_size, hidden]; lm_head is the same tensor when they are tied.
        final_norm: [hidden].
        cos_sin_cache: float32 [max_position_embeddings, head_dim].
        tokenizer: how text becomes ids, None for random weights.
        source: what the weights were loaded from.
        weight_layout: of its matrices; on the CPU see :mod:`ch15_helpers.model.cpu_weights`.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Allocates the weights uninitialised; :func:`load_model` fills them."""
        new = partial(torch.empty, device=device, dtype=dtype)
        self.config, self.device, self.dtype = config, device, dtype
        self.embed_tokens = new(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, device, dtype) for _ in range(config.num_hidden_layers)]
        self.final_norm = new(config.hidden_size)
        tied = config.tie_word_embeddings
        self.lm_head = self.embed_tokens if tied else torch.empty_like(self.embed_tokens)
        self.cos_sin_cache = build_cos_sin_cache(
            config.head_dim, config.max_position_embeddings, config.rope_theta,
            config.rope_scaling, device,
        )  # fmt: skip
        self.scale = float(config.head_dim**-0.5)
        self.tokenizer: Tokenizer | None = None
        self.source = ""
        self.weight_layout = "rows"

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        pages: Tensor,
        batch: BatchMetadata,
        *,
        attention_backend: str = "auto",
        on_layer_done: Callable[[int], None] | None = None,
        kv_scales: Tensor | None = None,
        wide: bool = True,
    ) -> Tensor:
        """Runs one step and returns the logits of the rows that will be sampled.

        Args:
            token_ids, positions: int64 [N], the flat batch.
            pages: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], any strides;
                this step's K and V are written into it.
            batch: queries, pages and slots of each sequence.
            attention_backend: see :func:`paged_attention`.
            on_layer_done: called with the layer's index once its K and V are in the pages.
            kv_scales: float32 [num_blocks, num_layers, 2, num_kv_heads], of quantised pages.
            wide: float32 logits, instead of the type that the model computes them in.

        Returns:
            [len(batch.logits_indices), vocab_size].
        """
        rows = batch.logits_indices
        # Of other tokens the last layer owes no more than keys and values. (A mixture of experts
        # goes on with all of them: how they spread over the experts is studied layer by layer.)
        wanted = rows if len(rows) < len(token_ids) and not self.config.is_moe else None
        hidden = self.forward_hidden(
            token_ids, positions, pages, batch, attention_backend=attention_backend,
            on_layer_done=on_layer_done, kv_scales=kv_scales, wanted=wanted,
        )  # fmt: skip
        return self.compute_logits(hidden.index_select(0, rows) if wanted is None else hidden, wide)

    __call__ = forward

    @torch.inference_mode()
    def forward_hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        pages: Tensor,
        batch: BatchMetadata,
        *,
        attention_backend: str = "auto",
        on_layer_done: Callable[[int], None] | None = None,
        kv_scales: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Like :meth:`forward`, but returns the final hidden states [N or len(wanted), hidden]."""
        attend_layer = partial(self.paged_attend, pages=pages, batch=batch,
                               backend=attention_backend, kv_scales=kv_scales)  # fmt: skip
        step = None
        if kv_scales is None and pages.dtype == self.dtype:
            step = partial(
                compiled_step, pages, batch, attention_backend, self.config.num_attention_heads,
                self.config.rms_norm_eps, self.scale,
            )  # fmt: skip
        return self._run_layers(token_ids, positions, attend_layer, on_layer_done, wanted, step)

    def paged_attend(
        self,
        layer_index: int,
        pages: Tensor,
        batch: BatchMetadata,
        backend: str = "auto",
        kv_scales: Tensor | None = None,
    ) -> Attend:
        """The attention of one layer over its pages: what :class:`DecoderLayer` calls."""
        k_cache, v_cache = pages.select(1, layer_index).unbind(1)
        scales = kv_scales[:, layer_index].unbind(1) if kv_scales is not None else None
        pair = None if scales is None else (scales[0], scales[1])
        return PagedAttend(k_cache, v_cache, batch, self.scale, backend, pair)

    @torch.inference_mode()
    def forward_dense(self, token_ids: Tensor) -> Tensor:
        """Recomputes everything: causal attention over whole sequences, no cache.

        Args:
            token_ids: int64 [batch, length].

        Returns:
            float32 [batch, length, vocab_size].
        """
        rows, length = token_ids.shape
        positions = torch.arange(length, device=self.device).repeat(rows)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.view(rows, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
            out = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
            return out.transpose(1, 2).flatten(0, 1)

        hidden = self._run_layers(token_ids.flatten(), positions, lambda _: attend, None)
        return self.compute_logits(hidden).view(rows, length, -1)

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor, wide: bool = True) -> Tensor:
        """Vocabulary logits [R, vocab_size] of hidden states [R, hidden]; ``wide`` is float32."""
        logits = linear(hidden, self.lm_head)
        return logits.float() if wide else logits

    def _run_layers(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend_layer: Callable[[int], Attend],
        on_layer_done: Callable[[int], None] | None,
        wanted: Tensor | None = None,
        make_step: Callable[[tuple[Tensor, Tensor]], CompiledStep | None] | None = None,
    ) -> Tensor:
        hidden, residual = embedding(token_ids, self.embed_tokens), None
        cache = self.cos_sin_cache
        rows = rope_rows(cache, positions) if self.device.type == "cpu" else None
        step = make_step(rows) if rows is not None and make_step is not None else None
        for index, layer in enumerate(self.layers):
            kept = wanted if layer is self.layers[-1] else None
            weights = layer.compiled_weights() if step is not None and kept is None else None
            if step is not None and weights is not None and residual is not None:
                hidden, residual = step.run_layer(index, weights, hidden, residual)
            else:
                attend = attend_layer(index)
                hidden, residual = layer(hidden, residual, positions, cache, attend, rows, kept)
            if on_layer_done is not None:
                on_layer_done(index)
        assert residual is not None
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps, residual)[0]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face checkpoint name.

        They are views into the fused ones, or copies where :func:`.pack_weights` packed those.
        """
        yield "model.embed_tokens.weight", self.embed_tokens
        for index, layer in enumerate(self.layers):
            for name, weight in layer.named_weights():
                yield f"model.layers.{index}.{name}", weight
        yield "model.norm.weight", self.final_norm
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", unpack_weight(self.lm_head)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(weight.nbytes for _, weight in self.named_weights())
