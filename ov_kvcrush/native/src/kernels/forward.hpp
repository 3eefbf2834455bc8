// Kernels that have an attention of their own and everything else of others.
#pragma once

#include "kernels/kernels.hpp"

namespace crush {
namespace {

// Functions, since BASE may be initialised later than what refers to it.
template <const Kernels& BASE>
struct Forward {
    static void attend(const AttendArgs& a) { BASE.attend(a); }
    static void scores(const uint8_t* const* tiles, size_t num_tiles, const float* q, int rows, float* s,
                       size_t stride) {
        BASE.scores(tiles, num_tiles, q, rows, s, stride);
    }
    static void softmax(float* s, size_t n) { BASE.softmax(s, n); }
    static void cap(float* s, size_t n, float cap) { BASE.cap(s, n, cap); }
    static void encode(uint8_t* tile, const float* k, size_t k_stride, const float* v, size_t v_stride, int count) {
        BASE.encode(tile, k, k_stride, v, v_stride, count);
    }
    static void decode(const uint8_t* tile, float* k, float* v) { BASE.decode(tile, k, v); }
    static void write_mean(uint8_t* tile) { BASE.write_mean(tile); }
    static void rank(const uint8_t* const* tiles, size_t num_tiles, const float* q, int rows, float* s, size_t stride) {
        BASE.rank(tiles, num_tiles, q, rows, s, stride);
    }
    static void append_token(uint8_t* tile, int slot, const float* k, const float* v) {
        BASE.append_token(tile, slot, k, v);
    }
    static void rotate(float* rows, int num_rows, int head_size, int channels) {
        BASE.rotate(rows, num_rows, head_size, channels);
    }
};

template <const Kernels& BASE>
constexpr Kernels forward(const char* isa, void (*attend)(const AttendArgs&),
                          void (*staged_scores)(const StagedScores&) = nullptr,
                          void (*prefill)(const Prefill&) = nullptr) {
    using F = Forward<BASE>;
    return {isa,        attend,        &F::scores, &F::softmax,      &F::cap,    &F::encode,    &F::decode,
            &F::write_mean, &F::rank, &F::append_token, &F::rotate, staged_scores, prefill};
}

}  // namespace
}  // namespace crush
