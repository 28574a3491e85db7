"""Patch embedding, decoder tokens and masked losses against the oracle's long way round."""

import pytest
import torch
import torch.nn.functional as F

from lmim_fast.config import ModelConfig, preset
from lmim_fast.models.positions import position_table
from lmim_fast.ops.feature_loss import masked_feature_target, masked_mse, masked_pixel_target
from lmim_fast.ops.masking import select_patches
from lmim_fast.ops.patch_embed import normalise_images, patch_embed
from lmim_fast.ops.tokens import decoder_tokens, gather_table, mask_table
from lmim_fast.reference import normalise_patches, patchify, sincos_table


@pytest.mark.parametrize("grid", ["released", "true"])
def test_position_table_is_the_oracle_table(grid: str) -> None:
    config = preset("tiny", pos_grid=grid)
    assert torch.equal(position_table(96, config), sincos_table(96, config))


def test_released_positions_fold_the_line_and_true_ones_do_not() -> None:
    released, true = position_table(64, ModelConfig()), position_table(64, ModelConfig(pos_grid="true"))
    assert torch.equal(released[0, 1 + 16, :32], released[0, 1, :32]), "column 16 has column 0's x"
    assert not torch.equal(true[0, 1 + 16, :32], true[0, 1, :32])
    assert torch.equal(true[0, 1 + 32, :32], true[0, 1, :32]), "the next row begins at column 0"


def test_embedding_kept_patches_equals_embedding_all_and_dropping() -> None:
    images = torch.rand(3, 3, 32, 128) * 2 - 1
    weight, bias = torch.randn(24, 3, 4, 4, requires_grad=True), torch.randn(24)
    position, cls = torch.randn(1, 257, 24), torch.randn(1, 1, 24)
    ids, _ = select_patches(torch.rand(3, 256), 51)
    full = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2) + position[:, 1:]
    kept = torch.stack([full[b, ids[b]] for b in range(3)])
    first = (cls + position[:, :1]).expand(3, -1, -1)
    for ours, theirs in (
        (patch_embed(images, weight, bias, position, cls), torch.cat([first, full], 1)),
        (patch_embed(images, weight, bias, position, cls, ids), torch.cat([first, kept], 1)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        upstream = torch.randn_like(theirs)
        (mine,) = torch.autograd.grad(ours, weight, upstream)
        (expected,) = torch.autograd.grad(theirs, weight, upstream, retain_graph=True)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


def test_normalised_uint8_covers_minus_one_to_one() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 1, 2, 3)
    assert normalise_images(pixels).flatten().tolist() == [-1.0, 1.0] * 3


def test_decoder_tokens_hold_cls_visible_and_masked_rows_with_their_positions() -> None:
    ids_visible, ids_masked = select_patches(torch.rand(2, 16), 5)
    visible, bias = torch.randn(2, 6, 8), torch.randn(8)
    mask_token, position = torch.randn(1, 1, 8), torch.randn(1, 17, 8)
    tokens = decoder_tokens(visible, bias, mask_token, position, ids_visible, ids_masked)
    torch.testing.assert_close(tokens[:, 0], visible[:, 0] + bias + position[0, 0])
    for b in range(2):
        torch.testing.assert_close(tokens[b, 1:6], visible[b, 1:] + bias + position[0, 1 + ids_visible[b]])
        torch.testing.assert_close(tokens[b, 6:], mask_token[0] + position[0, 1 + ids_masked[b]])
    table = mask_table(mask_token, position).requires_grad_()
    rows = gather_table(table, ids_masked)
    assert torch.equal(rows, tokens[:, 6:])
    rows.sum().backward()
    counts = ids_masked.flatten().bincount(minlength=16).float()
    assert table.grad is not None
    assert torch.equal(table.grad, counts[:, None].expand(-1, 8))


def test_targets_are_the_oracle_targets_at_masked_rows() -> None:
    _, ids_masked = select_patches(torch.rand(2, 256), 51)
    features = torch.randn(2, 257, 24, requires_grad=True)
    rows = ids_masked[:, :, None]
    expected = F.layer_norm(features[:, 1:], (24,), eps=1e-5).gather(1, rows.expand(-1, -1, 24))
    target = masked_feature_target(features, ids_masked)
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad
    images = torch.rand(2, 3, 32, 128) * 2 - 1
    for normalise in (False, True):
        pixels = patchify(images, 4)
        pixels = normalise_patches(pixels) if normalise else pixels
        ours = masked_pixel_target(images, ids_masked, 4, normalise=normalise)
        torch.testing.assert_close(ours, pixels.gather(1, rows.expand(-1, -1, 48)))


def test_masked_mse_refuses_to_broadcast() -> None:
    assert masked_mse(torch.zeros(2, 3, 4), torch.full((2, 3, 4), 3.0)) == 9.0
    with pytest.raises(ValueError, match=r"pred \(2, 3, 4\) and target \(2, 3, 1\)"):
        masked_mse(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1))


def test_wrong_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="ids_masked"):
        decoder_tokens(
            torch.zeros(1, 3, 8),
            torch.zeros(8),
            torch.zeros(1, 1, 8),
            torch.zeros(1, 9, 8),
            torch.zeros(1, 2, dtype=torch.long),
            torch.zeros(1, 5, dtype=torch.long),
        )
