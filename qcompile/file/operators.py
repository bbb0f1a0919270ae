"""The operators that graphs in files may name."""

from __future__ import annotations

import torch

from ..passes.aten import AVERAGE, LAYOUT, MAX_POOL

#: Operators that aten does not tag as core, but that models call.
_COMPOSITES = """
    __and__ __or__ __xor__ _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm adaptive_max_pool1d
    adaptive_max_pool3d addbmm addcmul addmv addr affine_grid_generator all any arange argsort baddbmm
    batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits block_diag broadcast_to
    bucketize cartesian_prod cdist celu chain_matmul channel_shuffle clamp_max clamp_min column_stack
    combinations complex concat conj conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d corrcoef cosine_embedding_loss cosine_similarity count_nonzero cov cross
    cross_entropy_loss cummax cummin cumprod cumsum diag diag_embed diagonal_scatter diff dot dropout
    dsplit dstack einsum embedding embedding_bag expand_as eye fft_fft fft_fft2 fft_fftfreq fft_fftn
    fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2
    fft_rfftfreq fft_rfftn fliplr flipud floor_divide full full_like glu grid_sampler grid_sampler_3d
    group_norm gru hamming_window hann_window hardsigmoid hardswish histc hsplit hstack huber_loss
    im2col imag index_add index_copy index_fill inner instance_norm isclose isin istft kl_div kron
    kthvalue l1_loss layer_norm lerp linalg_cross linalg_det linalg_inv linalg_matrix_norm linalg_norm
    linalg_solve linalg_vector_norm linear linspace log_sigmoid log_softmax logcumsumexp logspace
    logsumexp lstm masked_fill matmul matrix_exp max max_pool2d_with_indices max_pool3d_with_indices
    max_unpool2d max_unpool3d median meshgrid min mish mode moveaxis mse_loss msort mv nan_to_num
    nanmean nanmedian nanquantile nansum native_channel_shuffle new_full new_ones new_zeros nll_loss_nd
    norm numpy_T one_hot ones ones_like outer pad pairwise_distance pdist polar prelu quantile ravel
    real relu6 renorm reshape_as rms_norm rnn_relu rnn_tanh roll rot90 row_stack rsub
    scaled_dot_product_attention searchsorted selu silu smooth_l1_loss softmax softplus sort square
    stack std std_mean stft sum swapaxes swapdims sym_numel sym_size take take_along_dim tensor_split
    tensordot tile to trace trapezoid tril tril_indices triu triu_indices type_as unfold unsafe_chunk
    unsafe_split upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_trilinear3d vander
    var var_mean vdot view_as view_as_complex view_as_real vsplit vstack where zeros zeros_like
"""

#: Core operators that read files, uninitialised memory or the generator. (How large the tensors of a stored
#: graph get is checked when it is loaded.)
_NOT_FROM_FILES = """
    from_file empty empty_like empty_strided new_empty rand randn randint randperm bernoulli normal uniform
    resize_
"""

_LISTED = frozenset(_COMPOSITES.split()) | LAYOUT | MAX_POOL | AVERAGE
_REFUSED = frozenset(_NOT_FROM_FILES.split())


def is_listed(target: torch._ops.OpOverload) -> bool:
    """Whether graphs in files may call an operator: qcompile's own, and those of aten that are functions."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace == "qcompile":
        return True
    pure = not any(
        argument.alias_info and argument.alias_info.is_write for argument in target._schema.arguments
    )
    known = torch.Tag.core in target.tags or torch.Tag.pointwise in target.tags or name in _LISTED
    return namespace == "aten" and pure and known and name not in _REFUSED
