// The Python module: loading it registers the ops, and it says how it was built.
#include <pybind11/pybind11.h>

namespace {

const char* vector_extension() {
#if defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "baseline";
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["vector_extension"] = vector_extension();
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#ifdef SOFTPROMPT_FAST_CUDA
    info["cuda"] = SOFTPROMPT_FAST_CUDA;
#else
    info["cuda"] = pybind11::none();
#endif
    return info;
  });
}
