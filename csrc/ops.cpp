// Registers the executors as torch operators through LibTorch's stable ABI: one shared object for every torch from 2.11 on.
// Autograd and the shapes for torch.compile are registered in cegate/native.py.
#include <torch/csrc/stable/library.h>

#include "frequency.h"
#include "low_rank.h"

STABLE_TORCH_LIBRARY(cegate, m) {
  m.def(
      "low_pass(Tensor x, Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled) -> Tensor");
  m.def(
      "frequency_adapter(Tensor x, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor router, "
      "Tensor router_bias, Tensor scale, Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, "
      "bool coupled, int[] adapters) -> (Tensor, Tensor)");
  m.def(
      "frequency_adapter_backward(Tensor dy, Tensor x, Tensor active, Tensor down, Tensor up, Tensor up_bias, "
      "Tensor router, Tensor scale, Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, "
      "bool coupled, int[] adapters, bool wants_x, bool wants_weights) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "frequency_adapter_factors(Tensor x, Tensor dy, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, "
      "Tensor router, Tensor router_bias, Tensor scale, Tensor rows, Tensor columns, Tensor row_weights, "
      "Tensor column_weights, bool coupled) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "low_rank(Tensor x, Tensor down, Tensor up, Tensor? base, Tensor? down_bias, Tensor? up_bias, int activation, "
      "float scale, int[] adapters, bool keeps=True) -> (Tensor, Tensor)");
  m.def(
      "low_rank_factors(Tensor x, Tensor dy, Tensor down, Tensor up, Tensor? down_bias, int activation, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_backward(Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, bool down_bias, bool up_bias, "
      "int activation, float scale, int[] adapters, bool wants_x, bool wants_weights) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_qv_(Tensor(a!) qkv, Tensor x, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, float scale, "
      "int[] adapters, bool keeps=True) -> Tensor");
  m.def(
      "low_rank_qv_backward(Tensor dqkv, Tensor x, Tensor hidden, Tensor down_q, Tensor up_q, Tensor down_v, "
      "Tensor up_v, float scale, int[] adapters, bool wants_x, bool wants_weights) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cegate, CPU, m) {
  m.impl("low_pass", TORCH_BOX(&cegate::low_pass));
  m.impl("frequency_adapter", TORCH_BOX(&cegate::frequency_adapter));
  m.impl("frequency_adapter_backward", TORCH_BOX(&cegate::frequency_adapter_backward));
  m.impl("frequency_adapter_factors", TORCH_BOX(&cegate::frequency_adapter_factors));
  m.impl("low_rank", TORCH_BOX(&cegate::low_rank));
  m.impl("low_rank_factors", TORCH_BOX(&cegate::low_rank_factors));
  m.impl("low_rank_backward", TORCH_BOX(&cegate::low_rank_backward));
  m.impl("low_rank_qv_", TORCH_BOX(&cegate::low_rank_qv_));
  m.impl("low_rank_qv_backward", TORCH_BOX(&cegate::low_rank_qv_backward));
}
