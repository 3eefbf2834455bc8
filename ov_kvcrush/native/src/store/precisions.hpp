// Precisions of target tiles: a pair of codecs for each KV head, or one for each tier of a head's tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/tile.hpp"

namespace crush {

// Codecs of the keys and of the values of a tile.
struct CodecPair {
    Codec key, value;
    bool operator==(const CodecPair& other) const { return key == other.key && value == other.value; }
};
using Precisions = std::vector<CodecPair>;  // [heads]: of the target tiles of each head, numbered through all layers

// What an operation is to write: tiers of tokens, each with precisions of its own, tier 0 those with the most bits
// (LeanKV, arXiv 2412.03131). A tile takes the precisions of its best token.
struct Wanted {
    Precisions precisions;  // [heads, num_tiers]
    size_t num_tiers = 1;
    const uint8_t* tiers = nullptr;  // of each token that a selection keeps; null: all are in tier 0

    const CodecPair* of_head(size_t head) const { return &precisions[head * num_tiers]; }
    Precisions best() const;  // [heads]: those of tier 0
};

// Throws std::invalid_argument "precisions must be ..." or "tiers must be ...", got ...".
void check_precisions(const Precisions&, size_t num_heads);
void check_wanted(const Wanted&, size_t num_heads, size_t num_tokens);

// A token that an operation puts into a new tile.
struct MovedToken {
    int32_t index, position;  // cached or staged index; position in the text
    uint8_t tier;
};
// Puts tokens in the order of their new tiles: all by position; then the first 32 * num_target by tier, cut into tiles
// of 32, in each of which they ascend by position again. The newest stay behind them, whatever their tier.
void arrange(std::vector<MovedToken>& tokens, int64_t num_target);
// The best tier of `count` tokens.
uint8_t best_tier(const MovedToken* tokens, int64_t count);
// Of tiles cut from tokens sorted by tier, those of a tier that has tokens [begin, end): a tile is of the tier of its
// first token.
int64_t num_tier_tiles(int64_t begin, int64_t end);

Codec lower(Codec own, Codec wanted);  // the one with fewer bits, `own` if they have as many
// Codecs of a tile that has no more bits than wanted, in keys and in values: more would be bytes without information.
CodecPair lower(const TileLayout& own, CodecPair wanted);
bool has_more_bits(const TileLayout&, CodecPair wanted);

}  // namespace crush
