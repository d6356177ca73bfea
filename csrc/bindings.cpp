// Python's view of the row kernels and of the product. Each takes a struct of params.h as bytes: grpo_kernels/backends/params.py
// has filled it in and native.py has checked the tensors behind it. Neither includes nor links PyTorch, so one build serves every
// version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "products_cpu.h"
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

// Those of products: one more.
std::vector<std::string> product_isas() {
  std::vector<std::string> names = isas();
#ifdef GRPO_KERNELS_AMX
  if (names.back() == "avx512" && amx_usable()) names.push_back("amx");
#endif
  return names;
}

Product product_of(const std::string& isa) {
  static const std::vector<std::string> usable = product_isas();
  const std::string& name = isa.empty() ? usable.back() : isa;
  for (const std::string& candidate : usable) {
    if (candidate != name) continue;
#ifdef GRPO_KERNELS_AMX
    if (name == "amx") return products::amx;
#endif
#ifdef GRPO_KERNELS_X86_VARIANTS
    if (name == "avx512") return products::avx512;
    if (name == "avx2") return products::avx2;
#endif
    return products::baseline;
  }
  throw std::invalid_argument("isa '" + name + "' was not built or is not supported by this processor");
}

template <class Params>
const Params& read(const py::buffer_info& bytes) {
  if (bytes.size * bytes.itemsize != py::ssize_t(sizeof(Params))) {
    throw std::invalid_argument("the extension was built from another csrc/params.h; build it again");
  }
  return *static_cast<const Params*>(bytes.ptr);
}

template <class Params>
void define(py::module_& m, const char* name, void (*RowKernels::*kernel)(const Params&, int threads)) {
  m.def(name, [kernel](const std::string& isa, int threads, py::buffer params) {
    const py::buffer_info bytes = params.request();
    const Params& filled = read<Params>(bytes);
    const RowKernels& k = kernels(isa);
    py::gil_scoped_release release;
    (k.*kernel)(filled, threads);
  });
}

}  // namespace
}  // namespace grpo_kernels

PYBIND11_MODULE(_native, m) {
  using namespace grpo_kernels;
  m.doc() = "Compiled row kernels and products. Call through grpo_kernels.backends.native, which checks what these take on trust.";
  m.attr("sources") = GRPO_SOURCES;  // what setup.py compiled, by build_cuda.fingerprint
  m.def("isas", &isas);
  define(m, "statistics", &RowKernels::statistics);
  define(m, "close", &RowKernels::close);
  define(m, "gradient", &RowKernels::gradient);
  define(m, "policy", &RowKernels::policy);
  define(m, "transpose", &RowKernels::transpose);
  define(m, "pair_logits", &RowKernels::pair_logits);
  define(m, "pair_sums", &RowKernels::pair_sums);
  define(m, "divergence_statistics", &RowKernels::divergence_statistics);
  define(m, "jensen_shannon", &RowKernels::jensen_shannon);
  define(m, "divergence_gradient", &RowKernels::divergence_gradient);
  define(m, "divergence", &RowKernels::divergence);
  m.def("product_isas", &product_isas);
  m.def("product", [](const std::string& isa, int threads, py::buffer params) {
    const py::buffer_info bytes = params.request();
    const ProductParams& filled = read<ProductParams>(bytes);
    const Product product = product_of(isa);
    py::gil_scoped_release release;
    product(filled, threads);
  });
}
