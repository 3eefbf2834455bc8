// Reading and writing the tokens of tiles: up to 32 of them as float32, with their positions.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.hpp"
#include "kernels/tile.hpp"

namespace crush {

constexpr int MAX_HEAD_SIZE = 256;

struct TokenBuffer {
    alignas(ALIGNMENT) float k[TILE * MAX_HEAD_SIZE];  // [count, D]
    alignas(ALIGNMENT) float v[TILE * MAX_HEAD_SIZE];
    int32_t positions[TILE];
    int count = 0;
};

// Whether a tile of tokens at these positions must list them.
bool must_list(const int32_t* positions, int count);
// Whether a tile that holds tokens and does not list their positions can take this one.
bool can_follow(const uint8_t* tile, int64_t position);

// Makes `tile` one of this layout that holds no tokens; its codes are zero.
void make_empty(uint8_t* tile, const TileLayout&);
// Makes `tile` one of this layout that holds the buffer's tokens.
void write_tile(const Kernels&, uint8_t* tile, const TileLayout&, const TokenBuffer&);
// Copies `source` to `tile`, with one owner. The layout may list positions where the source does not.
void copy_tile(uint8_t* tile, const TileLayout&, const uint8_t* source);
// Sets the position of slot `slot`, the first unfilled one. If the tile does not list positions, can_follow must hold.
// Updates the bounds, not the count.
void set_position(uint8_t* tile, int slot, int32_t position);

// Takes the tokens from slot `count` on out of a tile, whose codes are the caller's.
void drop_positions(uint8_t* tile, int count);

// Reads positions of single tokens of the tiles of one head. Cheap in ascending order: it reads a tile at once.
class PositionReader {
public:
    explicit PositionReader(const std::vector<uint8_t*>& tiles) : tiles_(tiles) {}
    int32_t read(int64_t index) {  // of cached token `index`
        if (index / TILE != tile_) {
            tile_ = index / TILE;
            read_positions(tiles_[static_cast<size_t>(tile_)], positions_);
        }
        return positions_[index % TILE];
    }

private:
    const std::vector<uint8_t*>& tiles_;
    int64_t tile_ = -1;
    int32_t positions_[TILE];
};

// Reads single tokens of the tiles of one head. Cheap in ascending order: it decodes a tile when its first token is
// asked for.
class TokenReader {
public:
    TokenReader(const Kernels& kernels, const std::vector<uint8_t*>& tiles)
        : kernels_(kernels), tiles_(tiles), positions_(tiles) {}
    // Append cached token `index` to the buffer.
    void read(int64_t index, TokenBuffer& to);

private:
    const Kernels& kernels_;
    const std::vector<uint8_t*>& tiles_;
    PositionReader positions_;
    int64_t decoded_ = -1;
    alignas(ALIGNMENT) float k_[TILE * MAX_HEAD_SIZE];
    alignas(ALIGNMENT) float v_[TILE * MAX_HEAD_SIZE];
};

}  // namespace crush
