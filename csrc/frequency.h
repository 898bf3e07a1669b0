// The frequency module (Earth-Adapter, projected first and filtered after) and its low-pass.
#pragma once

#include <tuple>
#include <vector>

#include "tensors.h"

namespace cegate {

// rows, columns, row_weights, column_weights, coupled: see GridFilter.

// x [B, H*W, C] -> its low-pass.
Tensor low_pass(
    Tensor x, Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled);

// x + scale * mixture, and the activations [B, N, 3d+3] (relu | gates) for the backward. Weights of one adapter
// (down [3, d, C], down_bias [3, d], up [3, C, d], up_bias [3, C], router [3, C], router_bias [3], scale []) or stacked
// with a leading axis A and adapters[b] in -1 (off: x) .. A-1.
std::tuple<Tensor, Tensor> frequency_adapter(
    Tensor x, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor router, Tensor router_bias, Tensor scale,
    Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled, std::vector<int64_t> adapters);

// Gradients of x, down, down_bias, up, up_bias, router, router_bias, scale; empty tensors where none is wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frequency_adapter_backward(
    Tensor dy, Tensor x, Tensor active, Tensor down, Tensor up, Tensor up_bias, Tensor router, Tensor scale, Tensor rows,
    Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled, std::vector<int64_t> adapters, bool wants_x,
    bool wants_weights);

// Of one adapter: dx without the residual's dy, the gradient of the projections [B, N, 3d+3], scale * mixture [B, N, 3d+3],
// and each sample's gradients of the biases [B, 3d+3] and the scale [B] in float32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> frequency_adapter_factors(
    Tensor x, Tensor dy, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor router, Tensor router_bias,
    Tensor scale, Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled);

}  // namespace cegate
