#include "kernels/kernels.hpp"

#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace crush {

extern const Kernels KERNELS_SCALAR;
#if defined(__x86_64__)
extern const Kernels KERNELS_AVX2, KERNELS_AVX512, KERNELS_AMX;
#endif

namespace {

#if defined(__x86_64__)
// A process must ask Linux for permission to use the tile registers.
bool may_use_amx() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512vbmi") && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

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
    if (all.back() == &KERNELS_AVX512 && may_use_amx()) all.push_back(&KERNELS_AMX);
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
