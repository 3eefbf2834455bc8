#include "kernels/kernels.hpp"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(CRUSH_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace crush {

extern const Kernels KERNELS_SCALAR;
#if defined(CRUSH_X86)
extern const Kernels KERNELS_AVX2, KERNELS_AVXVNNI, KERNELS_AVX512, KERNELS_AVX512VNNI, KERNELS_AVX512BF16, KERNELS_AMX;
extern const Kernels KERNELS_BF16_EMULATED;
#endif

namespace {

#if defined(CRUSH_X86)
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
#if defined(CRUSH_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) all.push_back(&KERNELS_AVX2);
    if (avx2 && __builtin_cpu_supports("avxvnni")) all.push_back(&KERNELS_AVXVNNI);
    if (avx512) all.push_back(&KERNELS_AVX512);
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni) all.push_back(&KERNELS_AVX512VNNI);
    if (vnni && __builtin_cpu_supports("avx512bf16")) all.push_back(&KERNELS_AVX512BF16);
    if (avx512 && may_use_amx()) all.push_back(&KERNELS_AMX);
#endif
    return all;
}

constexpr const char* CAP = "OV_KVCRUSH_ISA";
// slowest first
constexpr const char* ISA_NAMES[] = {"scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"};

template <class Names>
std::string join(const Names& names) {
    std::string all;
    for (const std::string name : names) all += (all.empty() ? "" : ", ") + name;
    return all;
}

size_t rank_of(const std::string& isa) {
    return static_cast<size_t>(std::find(std::begin(ISA_NAMES), std::end(ISA_NAMES), isa) - ISA_NAMES);
}

// Read once: all stores of a process agree.
struct Choice {
    std::string cap;  // "" = none
    std::vector<const Kernels*> all = available();

    Choice() {
        const char* value = std::getenv(CAP);
        if (!value || !*value) return;
        cap = value;
        const size_t most = rank_of(cap);
        if (most == std::size(ISA_NAMES))
            throw std::invalid_argument(std::string(CAP) + " must be one of " + join(ISA_NAMES) + ", got " + cap);
        const auto above = [&](const Kernels* k) { return rank_of(k->isa) > most; };
        all.erase(std::remove_if(all.begin(), all.end(), above), all.end());
    }
};

const Choice& choice() {
    static const Choice made;  // an exception leaves it unmade: the next call throws again
    return made;
}

}  // namespace

const Kernels& kernels(const std::string& isa) {
    const std::vector<const Kernels*>& all = choice().all;
    if (isa.empty()) return *all.back();
    for (const Kernels* k : all) {
        if (isa == k->isa) return *k;
    }
#if defined(CRUSH_X86)
    if (isa == BF16_EMULATED && std::find(all.begin(), all.end(), &KERNELS_AVX512) != all.end())
        return KERNELS_BF16_EMULATED;
#endif
    throw std::invalid_argument("isa must be one of " + join(available_isas()) + " on this CPU" +
                                (isa_cap().empty() ? "" : std::string(" within ") + CAP + "=" + isa_cap()) + ", got " +
                                isa);
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* k : choice().all) names.emplace_back(k->isa);
    return names;
}

std::string isa_cap() { return choice().cap; }

}  // namespace crush
