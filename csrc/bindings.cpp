// Python's view of the row kernels. Arguments arrive as addresses, shapes and strides: grpo_kernels/backends/native.py has checked
// them. Neither includes nor links PyTorch, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "row_kernels_cpu.h"

namespace py = pybind11;

namespace grpo_kernels {

extern const RowKernels baseline;
#ifdef GRPO_KERNELS_X86_VARIANTS
extern const RowKernels avx2;
extern const RowKernels avx512;
#endif

namespace {

// Instruction sets that were built and that this processor has, best last.
std::vector<std::string> isas() {
  std::vector<std::string> names{"baseline"};
#ifdef GRPO_KERNELS_X86_VARIANTS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      names.push_back("avx512");
    }
  }
#endif
  return names;
}

const RowKernels& kernels(const std::string& isa) {
  static const std::vector<std::string> usable = isas();
  const std::string& name = isa.empty() ? usable.back() : isa;
  for (const std::string& candidate : usable) {
    if (candidate != name) continue;
#ifdef GRPO_KERNELS_X86_VARIANTS
    if (name == "avx512") return avx512;
    if (name == "avx2") return avx2;
#endif
    return baseline;
  }
  throw std::invalid_argument("isa '" + name + "' was not built or is not supported by this processor");
}

template <class Pointer>
Pointer pointer(std::uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

Tile tile_of(std::uintptr_t data, int64_t rows, int64_t columns, int64_t row_stride, int dtype) {
  return {pointer<void*>(data), rows, columns, row_stride, static_cast<Dtype>(dtype)};
}

Transform transform_of(double logit_scale, double softcap, double temperature, std::uintptr_t bias,
                       std::uintptr_t row_temperature) {
  return {logit_scale, softcap, temperature, pointer<const void*>(bias), pointer<const void*>(row_temperature)};
}

PolicyTerms terms_of(int kind, double epsilon_low, double epsilon_high, double delta, double sapo_temperature_pos,
                     double sapo_temperature_neg, bool use_bias_correction_kl) {
  return {static_cast<PolicyKind>(kind), epsilon_low, epsilon_high, delta, sapo_temperature_pos, sapo_temperature_neg,
          use_bias_correction_kl};
}

void statistics(const std::string& isa, int threads, const Tile& tile, const Transform& transform, std::uintptr_t target,
                std::uintptr_t stats, bool probs) {
  const RowKernels& k = kernels(isa);
  py::gil_scoped_release release;
  k.statistics({tile, transform, pointer<const int64_t*>(target), pointer<void*>(stats), probs}, threads);
}

void gradient(const std::string& isa, int threads, const Tile& tile, const Transform& transform, std::uintptr_t target,
              std::uintptr_t lse, std::uintptr_t logps, std::uintptr_t entropy, std::uintptr_t g, std::uintptr_t g_entropy,
              bool from_probs) {
  const RowKernels& k = kernels(isa);
  py::gil_scoped_release release;
  k.gradient({tile, transform, pointer<const int64_t*>(target), pointer<const void*>(lse), pointer<const void*>(logps),
              pointer<const void*>(entropy), pointer<const void*>(g), pointer<const void*>(g_entropy), from_probs},
             threads);
}

void policy(const std::string& isa, int threads, const Tile& tile, const Transform& transform, const PolicyTerms& terms,
            std::uintptr_t target, std::uintptr_t old, std::uintptr_t ref, std::uintptr_t advantages, std::uintptr_t w_policy,
            std::uintptr_t w_kl, std::uintptr_t w_entropy, std::uintptr_t logps, std::uintptr_t entropy) {
  const RowKernels& k = kernels(isa);
  py::gil_scoped_release release;
  k.policy({tile, transform, terms, pointer<const int64_t*>(target), pointer<const void*>(old), pointer<const void*>(ref),
            pointer<const void*>(advantages), pointer<const void*>(w_policy), pointer<const void*>(w_kl),
            pointer<const void*>(w_entropy), pointer<void*>(logps), pointer<void*>(entropy)},
           threads);
}

void transpose(const std::string& isa, int threads, const Tile& tile, std::uintptr_t out) {
  const RowKernels& k = kernels(isa);
  py::gil_scoped_release release;
  k.transpose({tile, pointer<void*>(out)}, threads);
}

}  // namespace
}  // namespace grpo_kernels

PYBIND11_MODULE(_native, m) {
  using namespace grpo_kernels;
  m.doc() = "Compiled row kernels. Call through grpo_kernels.backends.native, which checks what these take on trust.";
  py::class_<Tile>(m, "Tile").def(py::init(&tile_of), py::arg("data"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"),
                                  py::arg("dtype"));
  py::class_<Transform>(m, "Transform")
      .def(py::init(&transform_of), py::arg("logit_scale"), py::arg("softcap"), py::arg("temperature"), py::arg("bias"),
           py::arg("row_temperature"));
  py::class_<PolicyTerms>(m, "PolicyTerms")
      .def(py::init(&terms_of), py::arg("kind"), py::arg("epsilon_low"), py::arg("epsilon_high"), py::arg("delta"),
           py::arg("sapo_temperature_pos"), py::arg("sapo_temperature_neg"), py::arg("use_bias_correction_kl"));
  m.def("isas", &isas);
  m.def("statistics", &statistics, py::arg("isa"), py::arg("threads"), py::arg("tile"), py::arg("transform"), py::arg("target"),
        py::arg("stats"), py::arg("probs"));
  m.def("gradient", &gradient, py::arg("isa"), py::arg("threads"), py::arg("tile"), py::arg("transform"), py::arg("target"),
        py::arg("lse"), py::arg("logps"), py::arg("entropy"), py::arg("g"), py::arg("g_entropy"), py::arg("from_probs"));
  m.def("policy", &policy, py::arg("isa"), py::arg("threads"), py::arg("tile"), py::arg("transform"), py::arg("terms"),
        py::arg("target"), py::arg("old"), py::arg("ref"), py::arg("advantages"), py::arg("w_policy"), py::arg("w_kl"),
        py::arg("w_entropy"), py::arg("logps"), py::arg("entropy"));
  m.def("transpose", &transpose, py::arg("isa"), py::arg("threads"), py::arg("tile"), py::arg("out"));
}
