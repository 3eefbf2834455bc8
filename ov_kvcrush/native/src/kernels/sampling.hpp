// From a row of logits to a token: temperature, top-k, top-p, min-p and one draw; and log probabilities. The numpy twin
// is ov_kvcrush/engine/draw.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace crush {

constexpr size_t LOGIT_BLOCK = 64;  // logits whose maximum is known: passes leave out blocks that are too low

struct DrawParams {
    double temperature;  // 0 = the largest logit
    size_t top_k;        // 0 = no limit
    double top_p, min_p;
    uint64_t key;      // of the noise: a token's is a function of it and the token
    int num_logprobs;  // 0 = none are asked for, 1 = of the token, more = of the most probable ones, too
};

struct Drawn {
    int64_t token = -1;  // -1 if no token is possible: the largest logit is not finite
    double logprob = 0;  // before temperature; where none are asked for, the one it was drawn with, 0 if greedy
    std::vector<std::pair<int64_t, double>> top;
};

// The passes over logits of one instruction set. x: whole blocks; e: exp((x - max) * scale).
struct SamplingKernels {
    float (*maxima)(const float* x, size_t num_blocks, float* block_max);  // returns the largest, NaN apart
    double (*exp_sum)(const float* x, size_t num_blocks, float max, float scale);
    void (*exp_block)(const float* x, float max, float scale, float* e);
    // Whether a token of the block, of which the first is `token`, may arrive before `bound`.
    bool (*any_early)(const float* e, uint64_t key, uint64_t token, float bound);
    float (*mass_above)(const float* x, const float* e, float least);  // of x > least
};

// The kernels of kernels(isa). Throws std::invalid_argument for an instruction set that this CPU has not.
const SamplingKernels& sampling_kernels(const std::string& isa = "");

// Copies the logits (n of them) of the tokens whose bit is 1, and puts -inf in the place of the others: token 0 is the
// lowest bit of the first of (n + 31) / 32 words. One pass: 30 to 60 us for 152k, about what copying them takes; words
// of all zeros or ones, most of them in a grammar, are filled or copied whole.
void mask_logits(const float* logits, size_t n, const int32_t* mask, float* masked);

// A pure function of the logits (n of them) and the parameters.
Drawn draw(const float* logits, size_t n, const DrawParams& params, const SamplingKernels& kernels);

// Uniform bits of a token's noise: SplitMix64 of key and token (Steele, Lea, Flood 2014).
inline uint64_t noise_bits(uint64_t key, uint64_t token) {
    constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
    uint64_t x = key + token * golden + golden;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

}  // namespace crush
