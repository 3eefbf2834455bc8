#include "kernels.hpp"

#include <stdexcept>

namespace crush {

extern const Kernels KERNELS_SCALAR;
#if defined(__x86_64__)
extern const Kernels KERNELS_AVX2, KERNELS_AVX512;
#endif

namespace {

// Slowest first.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> all{&KERNELS_SCALAR};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) all.push_back(&KERNELS_AVX2);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        all.push_back(&KERNELS_AVX512);
#endif
    return all;
}

}  // namespace

const Kernels& kernels(const std::string& isa) {
    const std::vector<const Kernels*> all = available();
    if (isa.empty()) return *all.back();
    std::string names;
    for (const Kernels* k : all) {
        if (isa == k->isa) return *k;
        names += (names.empty() ? "" : ", ") + std::string(k->isa);
    }
    throw std::invalid_argument("isa must be one of " + names + " on this CPU, got " + isa);
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.emplace_back(k->isa);
    return names;
}

}  // namespace crush
