// The kernels of one instruction set, from its Simd* struct.
#pragma once

#include "kernels/attend_impl.hpp"
#include "kernels/codec_impl.hpp"
#include "kernels/recall_impl.hpp"

namespace crush {
namespace {

template <class I>
constexpr Kernels make_kernels(void (*attend)(const AttendArgs&) = &AttendImpl<I>::attend) {
    return {I::NAME,
            attend,
            &AttendImpl<I>::scores,
            &AttendImpl<I>::softmax,
            &AttendImpl<I>::cap,
            &CodecImpl<I>::encode,
            &CodecImpl<I>::decode,
            &RecallImpl<I>::write_mean,
            &RecallImpl<I>::rank,
            &CodecImpl<I>::append_token,
            &Hadamard<I>::rotate,
            nullptr,
            nullptr};
}

}  // namespace
}  // namespace crush
