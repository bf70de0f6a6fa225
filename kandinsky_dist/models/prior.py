"""The prior's forward over the tokens that can reach its output: diffusers' modules and weights, no padding.

diffusers runs 77 text tokens of every caption and reads the last token of the last layer. Padded keys have
weight 0 and attention is causal, so that outputs and gradients stay what they are (to rounding) if

- text is as long as the batch's longest caption, with the positions that its tokens have among 77;
- a shorter caption is followed at once by its other tokens, and its padding comes last: then causality alone
  hides the padding, and attention needs no mask;
- norms and matrices, which treat tokens one by one, are given those of all captions in one row, without the
  padding; attention, which is a small part of the work, is given captions of one length;
- several noise draws of a caption follow one text, each blind to the others;
- the last layer asks for the tokens that are read, not for all.

Letters of shapes: B samples, L text tokens of the longest caption, K noise draws, S = L + 1 + 3 K tokens of a
sequence, R tokens that are computed of the B x S, D width, E width of embeddings, H heads, C channels of a
head.
A sequence: text, pooled text, K x time, K x noised embedding, K x read-out, padding.
"""

import torch
from diffusers import PriorTransformer
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch import Tensor, nn
from torch.nn import functional

from kandinsky_dist.errors import ConfigError

_LAYOUT = {"added_emb_type": "prd", "encoder_hid_proj_type": "linear", "additional_embeddings": 4}


def make_pad_free(module: nn.Module) -> None:
    """Gives a `PriorTransformer` this forward. Modules, parameters and their names stay as they are.

    Before gradient checkpointing is switched on, which wraps the layers' forward.

    Raises:
        ConfigError: its sequence is another one than Kandinsky 2.2's.
    """
    assert isinstance(module, PriorTransformer)
    for name, needed in _LAYOUT.items():
        if module.config[name] != needed:
            raise ConfigError(
                f"model.prior has {name}={module.config[name]} in prior/config.json; a Kandinsky 2.2 "
                f"prior has {needed}, and no other can be trained"
            )
    module.__class__ = PadFreePrior
    for block in module.transformer_blocks:
        block.__class__ = PadFreeBlock


class PadFreePrior(PriorTransformer):
    """A `PriorTransformer` that takes texts of any length, and several noise draws of each."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        num_text_tokens: int | None = None,
    ) -> PriorTransformerOutput:
        """Predicts image embeddings. No host sync.

        Args:
            hidden_states: noised embeddings (B, E), or (B, K, E) for K draws of each sample.
            timestep: (B,) or (B, K).
            proj_embedding: pooled text (B, E).
            encoder_hidden_states: text states (B, L, E), L up to 77.
            attention_mask: bool (B, L), True on the text: at the beginning of each row, at least one.
            num_text_tokens: text tokens that are computed, as many as the mask has or more; None: all B x L.

        Returns:
            The prediction, of the shape of `hidden_states`.
        """
        num_draws = 1 if hidden_states.dim() == 2 else hidden_states.shape[1]
        length = encoder_hidden_states.shape[1]
        text_BLD = self.encoder_hidden_states_proj(encoder_hidden_states)
        if self.embedding_proj_norm is not None:
            proj_embedding = self.embedding_proj_norm(proj_embedding)
        pooled_BD = self.embedding_proj(proj_embedding)
        times_ND = self.time_embedding(self.time_proj(timestep.flatten()).to(self.dtype))
        noised_BKD = self.proj_in(hidden_states).view(len(hidden_states), num_draws, -1)
        places = self.positional_embedding.to(text_BLD.dtype)
        pooled_place, time_place, noised_place, readout_place = places[:, -4:].split(1, dim=1)
        readout_D = (self.prd_embedding.to(text_BLD.dtype) + readout_place).flatten()
        behind_BTD = torch.cat(
            [
                pooled_BD[:, None] + pooled_place,
                times_ND.view_as(noised_BKD) + time_place,
                noised_BKD + noised_place,
                readout_D.expand_as(noised_BKD),
            ],
            dim=1,
        )
        layout = _Layout(attention_mask, num_draws, num_text_tokens)
        hidden_BSD = functional.pad(text_BLD + places[:, :length], (0, 0, 0, behind_BTD.shape[1])).scatter(
            1, _rows(layout.behind_BT, behind_BTD.shape[2]), behind_BTD
        )
        if self.norm_in is not None:
            hidden_BSD = self.norm_in(hidden_BSD)
        hidden_RD = hidden_BSD.flatten(0, 1)
        if layout.packed_R is not None:
            hidden_RD = hidden_RD.index_select(0, layout.packed_R)
        *blocks, last = self.transformer_blocks
        visible_BSS = layout.visible()
        for block in blocks:
            hidden_RD = block(hidden_RD, layout.shape, layout.packed_R, visible_BSS)
        read_ND = last(hidden_RD, layout.shape, layout.packed_R, layout.visible_to_read(), layout.read_rows())
        predicted = self.proj_to_clip_embeddings(self.norm_out(read_ND))
        if hidden_states.dim() == 3:
            predicted = predicted.view_as(hidden_states).clone()  # FSDP2 warns of a view
        return PriorTransformerOutput(predicted_image_embedding=predicted)


class _Layout:
    """Where a sequence's tokens are, which of them are computed, and which see which.

    Attributes:
        shape: (B, S).
        behind_BT: places in a sequence of the tokens behind the text, T = 1 + 3 K.
        packed_R: places among all B x S tokens of those that are computed: first the B x K that are read,
            then the others, then padding if that many are asked for. None: all, in their order.
    """

    def __init__(self, mask_BL: Tensor, num_draws: int, num_text_tokens: int | None) -> None:
        num_behind = 1 + 3 * num_draws
        self._num_draws = num_draws
        self._rows_S = torch.arange(mask_BL.shape[1] + num_behind, device=mask_BL.device)
        self._pooled_B1 = mask_BL.sum(1, keepdim=True)
        self.shape = len(mask_BL), len(self._rows_S)
        self.behind_BT = self._pooled_B1 + self._rows_S[:num_behind]
        self._read_BK = self.behind_BT[:, -num_draws:]
        self.packed_R: Tensor | None = None
        if num_text_tokens is not None and num_text_tokens < mask_BL.numel():
            is_padding_BS = self._rows_S >= self._pooled_B1 + num_behind
            rank_BS = (1 + is_padding_BS.byte()).scatter(1, self._read_BK, 0)
            num_rows = num_text_tokens + self.behind_BT.numel()
            self.packed_R = rank_BS.flatten().argsort(stable=True)[:num_rows]

    def read_rows(self) -> Tensor:
        """Which of the R tokens are read, (B x K,)."""
        if self.packed_R is not None:
            return torch.arange(self._read_BK.numel(), device=self.packed_R.device)
        starts_B = torch.arange(self.shape[0], device=self._read_BK.device) * self.shape[1]
        return (starts_B[:, None] + self._read_BK).flatten()

    def visible(self) -> Tensor | None:
        """bool (B, S, S), query by key; None where causality is all there is to it."""
        if self._num_draws == 1:
            return None
        return self._visible_to(self._rows_S[None])

    def visible_to_read(self) -> Tensor:
        """bool (B, K, S) of the read tokens' queries."""
        return self._visible_to(self._read_BK)

    def _visible_to(self, queries_BQ: Tensor) -> Tensor:
        """What is at or before a query, unless both belong to draws and these are not the same."""
        steps_BQS = queries_BQ[..., None] - self._rows_S
        visible_BQS = steps_BQS >= 0
        if self._num_draws == 1:
            return visible_BQS
        is_shared_BQS = (queries_BQ <= self._pooled_B1)[..., None] | (self._rows_S <= self._pooled_B1)[
            :, None
        ]
        return visible_BQS & (is_shared_BQS | (steps_BQS % self._num_draws == 0))


class PadFreeBlock(BasicTransformerBlock):
    """A layer of the prior."""

    def forward(
        self,
        hidden_RD: Tensor,
        shape: tuple[int, int],
        packed_R: Tensor | None = None,
        visible_BQS: Tensor | None = None,
        read_N: Tensor | None = None,
    ) -> Tensor:
        """What diffusers' layer computes, for all tokens or for some.

        Args:
            hidden_RD: tokens.
            shape: (B, S).
            packed_R: their places among the B x S; None: they are all.
            visible_BQS: which keys each query sees; None: itself and those before it.
            read_N: which of the R are wanted, as many of each sequence, N = B x Q; None: all, Q = S.

        Returns:
            (R, D), or (N, D).
        """
        attention = self.attn1
        normed_RD = normed_ND = self.norm1(hidden_RD)
        if read_N is not None:
            hidden_RD, normed_ND = hidden_RD.index_select(0, read_N), normed_RD.index_select(0, read_N)
        # Three products: one over joined weights would copy them in every forward, which costs about as much
        # as it saves, and would go past the hooks of engines that gather a weight when its layer is called.
        query_ND = attention.to_q(normed_ND)
        query_BQD = (
            _apart(query_ND, shape, packed_R) if read_N is None else query_ND.unflatten(0, (shape[0], -1))
        )
        key_BSD, value_BSD = (
            _apart(layer(normed_RD), shape, packed_R) for layer in (attention.to_k, attention.to_v)
        )
        query_BHQC, key_BHSC, value_BHSC = (
            tensor.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for tensor in (query_BQD, key_BSD, value_BSD)
        )
        attended_BHQC = functional.scaled_dot_product_attention(
            query_BHQC,
            key_BHSC,
            value_BHSC,
            attn_mask=None if visible_BQS is None else visible_BQS[:, None],
            is_causal=visible_BQS is None,
        )
        attended_ND = attended_BHQC.transpose(1, 2).flatten(2).flatten(0, 1)
        if read_N is None and packed_R is not None:
            attended_ND = attended_ND.index_select(0, packed_R)
        project, dropout = attention.to_out
        hidden_ND = dropout(project(attended_ND)) + hidden_RD
        output_ND: Tensor = self.ff(self.norm3(hidden_ND)) + hidden_ND
        return output_ND


def _apart(packed_RD: Tensor, shape: tuple[int, int], packed_R: Tensor | None) -> Tensor:
    """Tokens at their places in the sequences, (B, S, D), and zeros at the others."""
    if packed_R is not None:
        num_samples, length = shape
        packed_RD = packed_RD.new_zeros(num_samples * length, packed_RD.shape[1]).index_copy(
            0, packed_R, packed_RD
        )
    return packed_RD.unflatten(0, shape)


def _rows(rows_BQ: Tensor, width: int) -> Tensor:
    """Rows as an index for `gather` and `scatter` along the second of three dimensions."""
    return rows_BQ[..., None].expand(-1, -1, width)
