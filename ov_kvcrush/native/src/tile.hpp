// A tile: 32 tokens of one KV head, keys and values with a codec each, in one piece of memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace crush {

constexpr int TILE = 32;  // tokens of a tile
constexpr size_t ALIGNMENT = 64;

enum class Codec : uint8_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, u4 = 4, u2 = 5 };

static constexpr int code_bits(Codec codec) {
    return codec == Codec::f32 ? 32 : codec == Codec::u8 ? 8 : codec == Codec::u4 ? 4 : codec == Codec::u2 ? 2 : 16;
}
static constexpr bool is_quantised(Codec codec) { return codec >= Codec::u8; }
static constexpr int codes_per_dword(Codec codec) { return 32 / code_bits(codec); }
static constexpr int code_shift(Codec codec, int i) { return 8 * (i % 4) + code_bits(codec) * (i / 4); }

// Where the parts of a tile lie: bytes from its start. Parts in this order, each at a multiple of 64 bytes:
//   header        TileHeader, 64 bytes
//   key codes     channels by tokens, see below
//   key scale/min f16 [D] each, quantised keys only: per channel within the tile, as KIVI. key = min + code * scale
//   value codes   tokens by channels, see below
//   value scale/min f16 [D / group_size][32] each, quantised values only: per token and group of channels
//   positions     int32 [32], scattered tiles only; else token t has position base_position + t
// Float codes are matrices: keys [D][32], values [32][D]. So neither q * k nor p * v needs a sum across the lanes of a
// register. Quantised codes are matrices of dwords, keys [D / n][32] and values [32 / n][D], with n = 32 / bits codes
// in a dword: of n neighbouring channels of a key, of n neighbouring tokens of a value. Code 4 * j + i of them lies at
// bits 8 * i + bits * j: after one shift and mask the bytes of a dword are four neighbours, as the int8 dot products of
// AVX-512 VNNI and AMX want them.
struct TileLayout {
    Codec key, value;
    bool scattered;
    int head_size;   // D: a multiple of 16, 16..256
    int group_size;  // channels that share a scale of the values: a multiple of 16 that divides D (unused by float
                     // values)
    uint32_t key_codes, key_scale, key_min, value_codes, value_scale, value_min, positions;
    uint32_t bytes;  // of the whole tile
};

// Throws std::invalid_argument for a head size or group size out of the rules above.
TileLayout make_layout(Codec key, Codec value, int head_size, int group_size, bool scattered);

struct alignas(ALIGNMENT) TileHeader {
    std::atomic<uint32_t> refs;  // owners; only an exclusive owner writes
    int32_t count;               // tokens in it, from slot 0 on; codes of the others are zero
    int32_t base_position;       // of slot 0, for tiles that are not scattered
    int32_t min_position, max_position;
    const TileLayout* layout;
};
static_assert(sizeof(TileHeader) == ALIGNMENT);

// static: this header is compiled for several instruction sets, whose copies of a function must not be merged.
static inline TileHeader& header(uint8_t* tile) { return *reinterpret_cast<TileHeader*>(tile); }
static inline const TileHeader& header(const uint8_t* tile) { return *reinterpret_cast<const TileHeader*>(tile); }
static inline const TileLayout& layout(const uint8_t* tile) { return *header(tile).layout; }
static inline int32_t position(const uint8_t* tile, int slot) {
    const TileLayout& l = layout(tile);
    return l.scattered ? reinterpret_cast<const int32_t*>(tile + l.positions)[slot] : header(tile).base_position + slot;
}

}  // namespace crush
