// The Python module: loading it registers the ops; it reports how it was built and the orders that Python repeats.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>

#include "params.h"

// The value of a macro as text: the flag is a bare number, because quotes do not survive every shell.
#define SPF_QUOTE(value) #value
#define SPF_TEXT(value) SPF_QUOTE(value)

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

pybind11::dict order(std::initializer_list<std::pair<const char*, int64_t>> members) {
  pybind11::dict values;
  for (const auto& [name, value] : members) values[name] = value;
  return values;
}

pybind11::dict enum_orders() {
  using namespace softprompt_fast;
  pybind11::dict orders;
  orders["MaskFormat"] = order({{"NONE", static_cast<int64_t>(MaskFormat::none)},
                                {"TWO_D", static_cast<int64_t>(MaskFormat::two_d)},
                                {"FOUR_D_BOOL", static_cast<int64_t>(MaskFormat::four_d_bool)},
                                {"FOUR_D_ADDITIVE", static_cast<int64_t>(MaskFormat::four_d_additive)}});
  orders["Status"] = order({{"BAD_TOKEN_ID", kBadTokenId},
                            {"BAD_PROMPT_ID", kBadPromptId},
                            {"BAD_MASK_VALUE", kBadMaskValue},
                            {"BAD_LENGTH", kBadLength},
                            {"BAD_OFFSET", kBadOffset}});
  orders["PlanColumn"] =
      order({{"SLOT", kPlanSlot}, {"LENGTH", kPlanLength}, {"PROMPT", kPlanPrompt}, {"POSITION", kPlanPosition}});
  orders["TableColumn"] = order({{"OWN_SLOT", kOwnSlot},
                                 {"OWN_LENGTH", kOwnLength},
                                 {"PREFIX_SLOT", kPrefixSlot},
                                 {"PREFIX_LENGTH", kPrefixLength}});
  return orders;
}

pybind11::dict constants() {
  using namespace softprompt_fast;
  return order({{"NO_ERROR", kNoError},
                {"STATUS_SIZE", kStatusSize},
                {"FEW_INTEGERS", kFewIntegers},
                {"PLAN_COLUMNS", kPlanColumns},
                {"TABLE_COLUMNS", kTableColumns}});
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("enum_orders", enum_orders);
  module.def("constants", constants);
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
    info["cuda"] = SPF_TEXT(SOFTPROMPT_FAST_CUDA);
#else
    info["cuda"] = pybind11::none();
#endif
    return info;
  });
}
