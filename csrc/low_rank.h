// Low-rank maps beside a frozen one: bottleneck adapters and LoRA, for a whole batch or sample by sample.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace cegate {

// base + scale * (activation(x down^T + down_bias) up^T + up_bias), and the biased pre-activation [B, T, r] if it `keeps` that
// for the backward, else an empty tensor.
// x [B, T, C], base [B, T, out]; weights of one adapter (down [r, C], up [out, r]) or stacked ([A, r, C] ...) with
// adapters[b] in -1 (off: base, or zero) .. A-1.
std::tuple<Tensor, Tensor> low_rank(
    Tensor x, Tensor down, Tensor up, std::optional<Tensor> base, std::optional<Tensor> down_bias,
    std::optional<Tensor> up_bias, int64_t activation, double scale, std::vector<int64_t> adapters, bool keeps);

// Gradients of x, down, up, down_bias, up_bias; empty tensors where none is wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_backward(
    Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, bool down_bias, bool up_bias, int64_t activation,
    double scale, std::vector<int64_t> adapters, bool wants_x, bool wants_weights);

// dx, the gradient of the pre-activation, and scale * activation(pre): what each sample's weight gradients are made of,
// from the gradient dy of scale * activation(x down^T + down_bias) up^T.
std::tuple<Tensor, Tensor, Tensor> low_rank_factors(
    Tensor x, Tensor dy, Tensor down, Tensor up, std::optional<Tensor> down_bias, int64_t activation, double scale);

// Adds to the query and value parts of qkv [B, T, 3 out] in place; returns the narrow hidden tensor [B, T, 2r] if it
// `keeps` it for the backward, else an empty one.
Tensor low_rank_qv_(
    Tensor qkv, Tensor x, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, double scale,
    std::vector<int64_t> adapters, bool keeps);

// Gradients of x, down_q, up_q, down_v, up_v.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_qv_backward(
    Tensor dqkv, Tensor x, Tensor hidden, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, double scale,
    std::vector<int64_t> adapters, bool wants_x, bool wants_weights);

}  // namespace cegate
