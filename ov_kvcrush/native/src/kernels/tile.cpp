#include "kernels/tile.hpp"

#include <stdexcept>
#include <string>

namespace crush {

namespace {

void require(bool ok, const char* field, const char* rule, int got) {
    if (!ok) throw std::invalid_argument(std::string(field) + " must be " + rule + ", got " + std::to_string(got));
}

// Gives a part `bytes` bytes at the end of what is laid out so far.
uint32_t place(uint32_t& end, int bytes) {
    const uint32_t begin = end;
    end += (static_cast<uint32_t>(bytes) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return begin;
}

}  // namespace

TileLayout make_layout(Codec key, Codec value, int head_size, int group_size, bool listed, bool with_mean,
                       bool rotated) {
    require(head_size >= 16 && head_size <= 256 && head_size % 16 == 0, "head_size", "a multiple of 16 in 16..256",
            head_size);
    if (is_quantised(value))
        require(group_size >= 16 && group_size % 16 == 0 && head_size % group_size == 0, "group_size",
                "a multiple of 16 that divides the head size", group_size);
    TileLayout l{};
    l.key = key;
    l.value = value;
    l.listed = listed;
    l.head_size = head_size;
    l.group_size = group_size;
    l.rotation = value == Codec::u2 && rotated ? head_size & -head_size : 0;
    const int key_params = is_quantised(key) ? 2 * head_size : 0;
    const int value_params = is_quantised(value) ? 2 * TILE * (head_size / group_size) : 0;
    uint32_t end = sizeof(TileHeader);
    l.mean = with_mean ? place(end, 2 * head_size) : 0;
    l.key_codes = place(end, TILE * head_size * code_bits(key) / 8);
    l.key_scale = place(end, key_params);
    l.key_min = place(end, key_params);
    l.value_codes = place(end, TILE * head_size * code_bits(value) / 8);
    l.value_scale = place(end, value_params);
    l.value_min = place(end, value_params);
    l.positions = place(end, listed ? TILE * static_cast<int>(sizeof(int32_t)) : 0);
    l.bytes = end;
    return l;
}

}  // namespace crush
