#include "store/precisions.hpp"

#include <algorithm>
#include <string>
#include <tuple>

#include "store/require.hpp"

namespace crush {

Precisions Wanted::best() const {
    Precisions pairs;
    for (size_t i = 0; i < precisions.size(); i += num_tiers) pairs.push_back(precisions[i]);
    return pairs;
}

void check_precisions(const Precisions& precisions, size_t num_heads) {
    check_wanted({precisions, 1, nullptr}, num_heads, 0);
}

void check_wanted(const Wanted& wanted, size_t num_heads, size_t num_tokens) {
    const size_t num_tiers = wanted.num_tiers;
    require(num_tiers >= 1 && num_tiers <= 256, "precisions must have 1 to 256 tiers", num_tiers);
    require(wanted.precisions.size() == num_heads * num_tiers,
            "precisions must have a row for each of the " + std::to_string(num_heads) + " KV heads of all layers",
            wanted.precisions.size() / num_tiers);
    for (size_t i = 0; i < wanted.precisions.size(); ++i) {
        const CodecPair pair = wanted.precisions[i], above = wanted.precisions[i % num_tiers ? i - 1 : i];
        for (const auto& [codec, best] : {std::pair{pair.key, above.key}, std::pair{pair.value, above.value}}) {
            require(static_cast<int>(codec) < NUM_CODECS, "precisions must be codecs in 0..5", static_cast<int>(codec));
            require(code_bits(codec) <= code_bits(best),
                    "precisions must have no more bits in a tier than in the one before, " +
                        std::to_string(code_bits(best)),
                    code_bits(codec));
        }
    }
    for (size_t i = 0; wanted.tiers && i < num_tokens; ++i) {
        if (wanted.tiers[i] < num_tiers) continue;
        require(false, "tiers must be below the " + std::to_string(num_tiers) + " tiers of precisions",
                static_cast<int>(wanted.tiers[i]));
    }
}

void arrange(std::vector<MovedToken>& tokens, int64_t num_target) {
    const auto is_older = [](const MovedToken& a, const MovedToken& b) {
        return std::tie(a.position, a.index) < std::tie(b.position, b.index);
    };
    std::sort(tokens.begin(), tokens.end(), is_older);
    const auto end = tokens.begin() + num_target * TILE;
    std::sort(tokens.begin(), end, [](const MovedToken& a, const MovedToken& b) {
        return std::tie(a.tier, a.position, a.index) < std::tie(b.tier, b.position, b.index);
    });
    for (auto tile = tokens.begin(); tile < end; tile += TILE) std::sort(tile, tile + TILE, is_older);
}

uint8_t best_tier(const MovedToken* tokens, int64_t count) {
    uint8_t best = tokens->tier;
    for (int64_t i = 1; i < count; ++i) best = std::min(best, tokens[i].tier);
    return best;
}

int64_t num_tier_tiles(int64_t begin, int64_t end) { return (end + TILE - 1) / TILE - (begin + TILE - 1) / TILE; }

Codec lower(Codec own, Codec wanted) { return code_bits(own) > code_bits(wanted) ? wanted : own; }

CodecPair lower(const TileLayout& own, CodecPair wanted) {
    return {lower(own.key, wanted.key), lower(own.value, wanted.value)};
}

bool has_more_bits(const TileLayout& own, CodecPair wanted) {
    return !(lower(own, wanted) == CodecPair{own.key, own.value});
}

}  // namespace crush
