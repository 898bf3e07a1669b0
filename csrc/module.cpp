// The Python face of what is no tensor operator. Importing this module also registers torch.ops.cegate (ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch_plan.h"
#include "loops.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of cegate; reached through cegate.ops.";
  m.attr("version") = CEGATE_VERSION;
  m.def("cpu_capability", cegate::cpu_capability, "Instruction set of the loops and tiles on this CPU.");

  using cegate::DispatchPlan;
  py::class_<DispatchPlan>(m, "DispatchPlan")
      .def(
          py::init<
              std::vector<std::string>, const std::vector<std::vector<std::vector<int64_t>>>&, const std::vector<int64_t>&>(),
          py::arg("kinds"), py::arg("gates"), py::arg("adapters"))
      .def_property_readonly("layers", &DispatchPlan::layers)
      .def_property_readonly("samples", &DispatchPlan::samples)
      .def("is_on", &DispatchPlan::is_on, py::arg("kind"), py::arg("layer"))
      .def("assignment", &DispatchPlan::assignment, py::arg("kind"), py::arg("layer"))
      .def("__repr__", &DispatchPlan::text);
}
