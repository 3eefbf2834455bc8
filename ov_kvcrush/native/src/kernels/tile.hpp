// A tile: 32 tokens of one KV head, keys and values with a codec each, in one piece of memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace crush {

constexpr int TILE = 32;       // tokens of a tile
constexpr int MAX_GAP = 1023;  // positions from a token of a tile to the next; a longer gap is a far one
constexpr size_t ALIGNMENT = 64;

enum class Codec : uint8_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, u4 = 4, u2 = 5 };
constexpr int NUM_CODECS = 6;

static constexpr int code_bits(Codec codec) {
    return codec == Codec::f32 ? 32 : codec == Codec::u8 ? 8 : codec == Codec::u4 ? 4 : codec == Codec::u2 ? 2 : 16;
}
static constexpr size_t bytes_per_number(Codec codec) { return static_cast<size_t>(code_bits(codec)) / 8; }  // floats
static constexpr bool is_quantised(Codec codec) { return codec >= Codec::u8; }
static constexpr int codes_per_dword(Codec codec) { return 32 / code_bits(codec); }
static constexpr int code_shift(Codec codec, int i) { return 8 * (i % 4) + code_bits(codec) * (i / 4); }

// Where the parts of a tile lie: bytes from its start. Parts in this order, each at a multiple of 64 bytes:
//   header        TileHeader, 64 bytes
//   mean          f16 [D], with means only: of the keys as they decode, once all 32 are there
//   key codes     channels by tokens, see below
//   key scale/min f16 [D] each, quantised keys only: per channel within the tile, as KIVI. key = min + code * scale
//   value codes   tokens by channels, see below
//   value scale/min f16 [D / group_size][32] each, quantised values only: per token and group of channels
//   positions     int32 [32], listed tiles only; those of other tiles ascend and are in the header
// Float codes are matrices: keys [D][32], values [32][D]. So neither q * k nor p * v needs a sum across the lanes of a
// register. Quantised codes are matrices of dwords, keys [D / n][32] and values [32 / n][D], with n = 32 / bits codes
// in a dword: of n neighbouring channels of a key, of n neighbouring tokens of a value. Code 4 * j + i of them lies at
// bits 8 * i + bits * j: after one shift and mask the bytes of a dword are four neighbours, as the int8 dot products of
// AVX-512 VNNI and AMX want them.
struct TileLayout {
    Codec key, value;
    bool listed;     // positions are stored one by one: they do not ascend, or more than one gap is far
    int head_size;   // D: a multiple of 16, 16..256
    int group_size;  // channels that share a scale of the values: a multiple of 16 that divides D (unused by float
                     // values)
    int rotation;    // channels of a block that the values are rotated in (kernels/hadamard.hpp), 0 = they are not
    uint32_t mean;   // 0 = there is none
    uint32_t key_codes, key_scale, key_min, value_codes, value_scale, value_min, positions;
    uint32_t bytes;  // of the whole tile
};

// Throws std::invalid_argument for a head size or group size out of the rules above.
// Values u2 are rotated in blocks of the largest power of two that divides D, unless `rotated` is false: so they were
// in files of old.
TileLayout make_layout(Codec key, Codec value, int head_size, int group_size, bool listed, bool with_mean = false,
                       bool rotated = true);

struct alignas(ALIGNMENT) TileHeader {
    std::atomic<uint32_t> refs;  // owners; only an exclusive owner writes
    int32_t count;               // tokens in it, from slot 0 on; codes of the others are zero
    int32_t min_position, max_position;
    const TileLayout* layout;
    // Tiles that are not listed: gap t is the position of slot t less that of slot t - 1, and 0 if it is the far one,
    // which is what the others leave of max_position - min_position. (Not read where every gap is 1.)
    uint64_t gap_high;      // bits 8 and 9 of gap t at bit 2 * t
    uint8_t gap_low[TILE];  // bits 0 to 7; [0]: slot of the far gap, 0 = none
};
static_assert(sizeof(TileHeader) == ALIGNMENT);

// static: this header is compiled for several instruction sets, whose copies of a function must not be merged.
static inline TileHeader& header(uint8_t* tile) { return *reinterpret_cast<TileHeader*>(tile); }
static inline const TileHeader& header(const uint8_t* tile) { return *reinterpret_cast<const TileHeader*>(tile); }
static inline const TileLayout& layout(const uint8_t* tile) { return *header(tile).layout; }
// Positions of the tokens of a tile: as many numbers as it holds, 32 at most, are written to `to`.
static inline void read_positions(const uint8_t* tile, int32_t* to) {
    const TileHeader& h = header(tile);
    const int32_t count = h.count, first = h.min_position;
    if (h.layout->listed) {
        const auto* from = reinterpret_cast<const int32_t*>(tile + h.layout->positions);
        for (int t = 0; t < count; ++t) to[t] = from[t];
    } else if (h.max_position - first == count - 1) {  // ascending, so nothing is missing between
        for (int t = 0; t < count; ++t) to[t] = first + t;
    } else {
        const uint64_t high = h.gap_high;
        int32_t at = first;
        for (int t = 0; t < count; ++t) {
            if (t > 0) at += h.gap_low[t] + (static_cast<int32_t>(high >> 2 * t & 3) << 8);
            to[t] = at;
        }
        const int32_t far = h.max_position - at;
        for (int t = h.gap_low[0]; t > 0 && t < count; ++t) to[t] += far;
    }
}

}  // namespace crush
