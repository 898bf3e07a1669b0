// The Python face of what is no tensor operator. Importing this module also registers torch.ops.cegate (ops.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gate_plan.h"
#include "loops.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of cegate; reached through cegate.ops.";
  m.attr("version") = CEGATE_VERSION;
  m.def("cpu_capability", cegate::cpu_capability, "Instruction set of the loops and tiles on this CPU.");

  using cegate::GatePlan;
  py::class_<GatePlan>(m, "GatePlan")
      .def(
          py::init<
              const std::vector<std::vector<std::vector<int64_t>>>&, std::vector<int64_t>, const std::array<int64_t, 3>&>(),
          py::arg("gates"), py::arg("adapters"), py::arg("weights"))
      .def_property_readonly("layers", &GatePlan::layers)
      .def_property_readonly("samples", &GatePlan::samples)
      .def_property_readonly("first_layer", &GatePlan::first_layer)
      .def_property_readonly("last_layer", &GatePlan::last_layer)
      .def_property_readonly("packed_weights", &GatePlan::packed_weights)
      .def_property_readonly("order", &GatePlan::order)
      .def("is_on", &GatePlan::is_on, py::arg("kind"), py::arg("layer"))
      .def("offset", &GatePlan::offset, py::arg("kind"), py::arg("layer"))
      .def("assignment", &GatePlan::assignment, py::arg("kind"), py::arg("layer"))
      .def("__repr__", &GatePlan::text);
}
