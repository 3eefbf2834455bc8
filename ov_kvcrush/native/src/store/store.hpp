// The compressed KV store: for each sequence, layer and KV head a ragged list of tokens in tiles.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/kernels.hpp"
#include "kernels/tile.hpp"
#include "store/arena.hpp"
#include "store/claim.hpp"
#include "store/precisions.hpp"

namespace crush {

// Thrown where nbytes would exceed max_bytes. The text has both numbers.
struct StoreFull : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// How many of a head's tokens a decode step reads, beside sinks and the recent window: those of the tiles whose mean
// keys its queries are closest to (after ClusterKV, arXiv 2412.03213). Off: all.
struct RecallConfig {
    int64_t tokens = 0;   // at least 64
    double fraction = 0;  // instead: of what the head holds, above 0 and below 1

    bool is_on() const { return tokens > 0 || fraction > 0; }
    int64_t num_tiles(int64_t num_tokens) const;  // ranked tiles that are read of a head with so many tokens
};
constexpr int RECALL_ROWS = 4;  // the most rows of a step that are ranked; steps with more read everything
constexpr int SINK_TOKENS = 4;  // the first of the text: their tiles are always read

struct StoreConfig {
    std::vector<LayerShape> layers;
    Codec key = Codec::u8, value = Codec::u8;  // of target tiles, unless a sequence has precisions of its own
    Codec recent = Codec::bf16;  // of keys and values of the recent window: f32, bf16 or f16
    int recent_tokens = 32;      // the newest tokens of a head that are in the recent codec, at least
    int group_size = 32;   // channels per scale of quantised values; a layer with another D takes gcd(group_size, D)
    size_t max_bytes = 0;  // hard limit of nbytes; 0 = none
    std::string isa;       // "" = the best
    RecallConfig recall;   // on: tiles have means, and those of a prompt hold tokens whose keys are alike
};

// Which tokens of each (layer, KV head) to keep: indices[offsets[l * K + h] .. offsets[l * K + h + 1]), ascending.
// (K may differ between layers: heads are numbered through all layers.)
struct Selection {
    const int64_t* offsets;  // [num_offsets]: heads of all layers + 1, from 0 to num_indices
    size_t num_offsets;
    const int32_t* indices;  // [num_indices]
    size_t num_indices;
};

// A prompt's keys and values as PagedAttention wrote them: [block, K, 32, D] of f32, bf16 or f16, one pair per layer.
struct Staging {
    uint8_t* keys = nullptr;
    uint8_t* values = nullptr;
    size_t num_blocks = 0;
    Codec codec = Codec::bf16;
};

// The tokens of one KV head. Its tiles in order: full target ones, of any codecs; ones of the recent codec, of which
// the last may be partly filled; empty ones from `reserve`. A token's number through all tiles is its cached index.
struct Head {
    std::vector<uint8_t*> tiles;
    int64_t num_tokens = 0;
    int64_t num_target = 0;  // target tiles, at the front
};

// Queries of the last rows of a sequence in one layer: a ring buffer [capture_rows, H * D], of which the first rows are
// there while fewer were seen. Forks share it; who captures copies it first.
struct Capture {
    std::vector<float> q;
    std::vector<int32_t> position;
    int64_t seen = 0;   // rows so far; row i is in slot i % capture_rows
    int64_t first = 0;  // rows before it were written over by rows that were dropped since

    int64_t oldest() const { return std::max(first, seen - static_cast<int64_t>(position.size())); }
    // The last rows that are at `begin` or behind it.
    int64_t num_from(int64_t begin) const {
        int64_t n = 0;
        while (seen - n > oldest() && position[static_cast<size_t>(seen - n - 1) % position.size()] >= begin) ++n;
        return n;
    }
    void drop(int64_t num_rows) {
        first = oldest();
        seen -= num_rows;
    }
};

struct Sequence {
    std::vector<Head> heads;    // of all layers, layer by layer
    Precisions precisions;      // of target tiles that are written from now on
    int64_t next_position = 0;  // 1 + the largest position of a token so far, dropped ones included
    int64_t capture_rows = 0;
    std::vector<std::shared_ptr<Capture>> captures;  // [layers] if capture_rows > 0; null: nothing was captured
    std::vector<int32_t> staged_blocks;              // block table of a fresh prompt
    int64_t staged_tokens = 0;
};

// All tokens of one head, in the order of its tiles.
struct HeadTokens {
    std::vector<float> k, v;  // [tokens, D]
    std::vector<int32_t> positions;
};

// What a sequence holds, for files. Entry h of `heads` describes head h, numbered as in Sequence.
struct DumpedHead {
    int64_t num_tokens, num_target;  // as in Head
    int64_t bytes;                   // of its tiles
    int64_t next_position;           // of the sequence: the same for all heads
    int64_t key, value;              // Codec: precisions of the head, as in Sequence
};
struct Dump {
    std::vector<DumpedHead> heads;
    std::vector<uint8_t> tiles;  // of all heads, one after the other; see store/serialize.cpp
};

// Rows of a sequence in one step: num_rows rows from row_begin on, at positions first_position, ...
struct RowSpan {
    const Sequence* sequence;
    size_t row_begin, num_rows;
    int32_t first_position;
};

struct TokenBuffer;

void check_capture_rows(int64_t rows);  // throws std::invalid_argument

// Whether Store::prefill_locked is to read prompts of all these layers, with staging blocks of this codec: the kernels
// have one of their own for it, or PagedAttention cannot, since scores are capped.
bool can_prefill(const Kernels& kernels, const std::vector<LayerShape>& layers, Codec staging);

// Every public function takes the lock, but for the *_locked ones: their caller holds it, for a whole layer.
class Store {
public:
    Store(StoreConfig config, ParallelFor parallel);  // throws std::invalid_argument naming the field
    ~Store();
    Store(const Store&) = delete;
    Store& operator=(const Store&) = delete;

    const StoreConfig& config() const { return config_; }
    const Kernels& kernels() const { return *kernels_; }

    // Precisions of target tiles, here and below: null = as they are; of a new sequence, those of the config. Throws
    // std::invalid_argument unless there is a pair of known codecs for each head.
    int32_t create(int64_t capture_rows = 0, const Precisions* = nullptr);
    // Tiles that are there stay as they are.
    void set_precisions(int32_t id, const Precisions&);
    Precisions precisions(int32_t id) const;
    void release(int32_t id);
    // A new sequence that shares all tiles with this one. With num_tokens it has only the positions below num_tokens:
    // every head must hold exactly the positions 0..n-1, n >= num_tokens, and the tile that is truncated is decoded
    // into a new tile of the recent codec; where tokens are grouped by their keys, it is compacted. Throws StoreFull
    // where that tile does not fit. Captured queries are shared, unless num_tokens is given: then there are none.
    int32_t fork(int32_t id, std::optional<int64_t> num_tokens = std::nullopt);

    // Allocates slots for num_tokens more tokens in every head, and room for their captured queries: new tiles, and a
    // copy of the last one where it is partly filled and shared, or must list its positions to take the next one. All
    // or nothing: false, without a change, if nbytes would exceed max_bytes - promised.
    bool reserve(int32_t id, int64_t num_tokens, size_t promised = 0);
    // Tokens that every head can take at the next position without another reserve.
    int64_t free_slots(int32_t id) const;
    // append_locked, with the lock.
    void append(int32_t id, size_t layer, const float* k, const float* v, int64_t n, int64_t first_position);
    // Takes back the tokens, and the captured queries, at positions from num_tokens on: the sequence is as before they
    // were appended, but for captured queries that they took the place of. Empty tiles are freed. Throws
    // std::invalid_argument where some have left the recent window, or share a tile, with nothing changed.
    void crop(int32_t id, int64_t num_tokens);
    // Encodes tokens that have left the recent window of each head into target tiles; with recall, those of several
    // tiles are grouped by their keys. Never fails: a tile
    // that cannot be replaced within the limit, or for want of memory, stays as it is until the next call.
    void quantize_aged(int32_t id);

    void set_staging(size_t layer, Staging staging);
    // The prompt of an empty sequence lies in these staging blocks. num_tokens = 0 detaches it.
    void attach_prefill(int32_t id, std::vector<int32_t> blocks, int64_t num_tokens);
    // Encodes the staged tokens (all, or a selection by token index) into tiles of the sequence, and detaches the
    // staging blocks. Throws StoreFull, with nothing changed. With tiers, the tokens of target tiles are in the order
    // of `arrange`, and later ones are written in the precisions of tier 0; tiers need a selection.
    void commit_prefill(int32_t id, const Selection* selection = nullptr, size_t promised = 0, const Wanted* = nullptr);
    // Keeps only the selected cached tokens. New order of a head: first its target tiles that keep all 32 tokens,
    // encoded anew with as many bits as the precisions if they have more in keys or values, else untouched; then the
    // other tokens in their order, the oldest in new target tiles, the newest in recent tiles. A head that keeps all
    // tokens and needs no tile anew is left alone. Empty tiles are freed. Returns the old cached index of each new one,
    // head by head as in the selection. Throws StoreFull, with nothing changed, if the result does not fit (where
    // tiles are shared it can take more bytes than before). With tiers, only tiles whose tokens are of one tier stay
    // together, in its precisions, and the tokens of others are in the order of `arrange`.
    std::vector<int32_t> compact(int32_t id, const Selection& selection, const Wanted* = nullptr);

    // What a sequence holds, without empty tiles and captured queries. Same content, same bytes. Throws for a staged
    // one.
    Dump dump(int32_t id) const;
    // A new sequence from the dump of a store with the same layers, recent codec and group size, with the precisions of
    // the dump. Throws std::invalid_argument for anything that this store would not have written, StoreFull where it
    // does not fit.
    int32_t load(const std::vector<DumpedHead>& heads, const uint8_t* tiles, size_t num_bytes, int64_t capture_rows = 0,
                 size_t promised = 0);

    HeadTokens read(int32_t id, size_t layer, size_t head) const;
    std::vector<int32_t> positions(int32_t id, size_t layer, size_t head) const;
    int64_t num_tokens(int32_t id, size_t layer, size_t head) const;

    size_t nbytes() const;               // bytes of all tiles in use and of captured queries, each counted once
    size_t nbytes_of(int32_t id) const;  // bytes of what a sequence can reach, shared or not
    // Of some sequences together: bytes of all that they can reach, each counted once, and those of what nobody else
    // holds, by which nbytes shrinks if all of them are released.
    struct Bytes {
        size_t held, freed;
    };
    Bytes nbytes_of_all(std::vector<int32_t> ids) const;
    size_t reserved_bytes() const;  // what the arena holds of the operating system's memory
    // Of a sequence that commits so many tokens of a prompt in every head, or in each (of which no tile must list its
    // positions). Precisions: null = those of the config. With tiers, numbers [heads, num_tiers]: the newest tokens,
    // those that are not in target tiles, count in tier 0 whatever their tier. (Where it has fewer, in the next ones.)
    size_t bytes_for(int64_t num_tokens, const Precisions* = nullptr) const;
    size_t bytes_for(const std::vector<int64_t>& num_tokens, const Wanted* = nullptr) const;
    size_t num_heads() const { return layer_of_.size(); }  // of all layers
    // Bytes of `rows` captured query rows in all layers, which are 65536 at most; with a sequence, those it does not
    // have for itself yet.
    size_t capture_bytes(int64_t rows, std::optional<int32_t> id = std::nullopt) const;
    size_t num_sequences() const;

    // For callers that hold the lock.
    std::mutex& mutex() const { return mutex_; }
    Sequence& sequence_locked(int32_t id);  // throws std::invalid_argument "sequence must be ..., got ..."
    const Sequence& sequence_locked(int32_t id) const;
    // Appends rows k, v [n, K * D] at positions first_position, ... to a layer. Throws std::logic_error where slots for
    // them are not reserved. Rows that do not continue at the sequence's next position may need tiles that list their
    // positions: throws StoreFull where those do not fit.
    void append_locked(Sequence&, size_t layer, const float* k, const float* v, int64_t n, int32_t first_position);
    // The queries of rows that follow those captured. Throws StoreFull where no room was made for them and none is
    // left.
    void capture_locked(Sequence&, size_t layer, const float* q, int64_t n, int32_t first_position);
    // Sets how many query rows are captured. A new number drops those captured so far.
    void set_capture(int32_t id, int64_t rows);
    // The captured queries of a layer, oldest first: rows [n, H * D] and their positions are appended to the vectors.
    void captured_locked(const Sequence&, size_t layer, std::vector<float>& rows,
                         std::vector<int32_t>& positions) const;
    // Writes rows k, v [rows, K * D] of staged prompts to their blocks, and attends with q [rows, H * D] to all tokens
    // of its prompt up to the row itself: out [rows, H * D].
    void prefill_locked(size_t layer, const std::vector<RowSpan>&, const float* q, const float* k, const float* v,
                        float* out, int num_threads) const;
    // The filled tiles of each KV head. Valid until the sequence changes.
    std::vector<HeadView> views_locked(const Sequence&, size_t layer) const;
    // With recall, the numbers of the tiles that these rows of queries [.., H * D] read, ascending, for each KV head;
    // an empty list: all.
    std::vector<std::vector<int32_t>> recalled_locked(const RowSpan&, size_t layer, const float* q) const;
    // Attention of rows q [.., H * D] over what is stored, to the same rows of out.
    void attend_locked(size_t layer, const std::vector<RowSpan>&, const float* q, float* out, int num_threads) const;
    // The means of the first num_target_tiles tiles of a head: f32 [tiles, D]. Throws without recall.
    std::vector<float> means(int32_t id, size_t layer, size_t head) const;
    // Tiles of a staged prompt from token first_tile * 32 to num_tokens, copied from its staging blocks into `storage`:
    // with keys only, for scores, or with values too.
    std::vector<HeadView> staged_views_locked(const Sequence&, size_t layer, const TileLayout&, size_t first_tile,
                                              size_t num_tokens, std::vector<uint8_t>& storage,
                                              std::vector<const uint8_t*>& pointers) const;
    // Appends to `out` the attention_scores of rows q [num_rows, H * D] over a layer of a sequence, stored or staged.
    void scores_locked(const Sequence&, size_t layer, const float* q, const int32_t* row_position, size_t num_rows,
                       Reduce, std::vector<float>& out) const;

private:
    struct Layouts {
        TileLayout of[NUM_CODECS][NUM_CODECS][2];  // [key][value][listed]; tiles point to them
        TileLayout plain_u2[NUM_CODECS][2];        // [key][listed]: values u2 that are not rotated, from files of old
        TileLayout staged_keys, staged;            // as staged: keys only, and with values
        Staging staging;
    };
    // Rings to take the place of those of a sequence; null: that one stays.
    struct Rings {
        std::vector<std::shared_ptr<Capture>> made;  // [layers], or empty
        size_t add = 0, remove = 0;                  // bytes
    };
    struct Chunks;  // the tokens of a head that are committed
    struct Kept;    // those that compact keeps
    struct CompactPlan;
    struct TokenRows;
    struct Record;

    void release_locked(int32_t id);
    std::unique_ptr<Sequence> new_sequence(int64_t capture_rows) const;
    void run_parallel(
        size_t n,
        const std::function<void(size_t)>& task) const;  // throws the first exception of a task at the end
    size_t check_head(size_t layer, size_t head) const;  // its number
    size_t head_size(size_t head) const { return static_cast<size_t>(config_.layers[layer_of_[head]].head_size); }
    void check_selection(const Selection&, const std::function<int64_t(size_t)>& num_tokens) const;
    int64_t num_target_tiles(int64_t num_tokens) const;
    // What is wanted, checked, or the precisions of the sequence.
    Wanted wanted_of(const Sequence&, const Wanted*, size_t num_tokens) const;
    // One for each pair of codecs, whatever the tile is for: kernels process runs of tiles of one layout.
    const TileLayout& layout_for(size_t head, CodecPair, bool listed) const;
    // The bytes and slots of what a claim lists. False, or StoreFull, where they do not fit: then the claim must end.
    bool try_grant(Claim&, size_t promised = 0);
    void grant(Claim&, size_t promised = 0);
    size_t max_reserved(size_t removed, const std::vector<size_t>& more) const;
    void tidy() noexcept;  // after tiles were freed
    void move_tiles() noexcept;
    size_t row_bytes(size_t layer) const;  // of a captured row
    size_t ring_bytes(const Capture*, size_t layer) const;
    Rings larger_rings(const Sequence&, size_t begin, size_t end, int64_t num_rows) const;
    void take_rings(Sequence&, size_t begin, Rings&) noexcept;
    size_t drop_rings(Sequence&) noexcept;      // as drop_owner
    size_t drop_owner(uint8_t* tile) noexcept;  // returns the bytes this frees; they stay claimed
    bool reserve_heads(Sequence&, size_t begin, size_t end, int64_t num_tokens, int64_t position, Claim&,
                       size_t promised);
    void append_head(Head&, const float* k, const float* v, size_t stride, int64_t n, int32_t first_position) const;
    void quantize_aged_locked(Sequence&);
    void check_staged(const Sequence&, size_t layer) const;
    void read_staged(const Sequence&, size_t layer, size_t head, const int32_t* tokens, int count, TokenBuffer&) const;
    void read_staged_keys(const Sequence&, size_t head, const std::vector<MovedToken>&, float* to) const;
    // Attention of rows of staged prompts whose keys and values are in their blocks.
    void attend_staged(size_t layer, const std::vector<RowSpan>&, const float* q, float* out, int num_threads) const;
    // Appends the scores of a staged prompt straight from its blocks. False if the kernels cannot.
    bool score_blocks(const Sequence&, size_t layer, StagedScores, std::vector<float>& out) const;
    // Whether so many tokens of a head are put into tiles by their keys: where a step does not read all of them.
    bool groups(size_t head, int64_t num_tokens) const;
    std::vector<int32_t> recalled(const RowSpan&, size_t head, const float* q) const;
    void commit_head(const Sequence&, size_t head, const Chunks&, const Claim&, size_t first) const;
    std::vector<int32_t> compact_locked(Sequence&, const Selection&, const Wanted* = nullptr);
    CompactPlan plan_compact(size_t head, const Head&, const Kept&) const;
    void plan_new(size_t head, CodecPair, const MovedToken*, int64_t count, CompactPlan&) const;
    void read_tokens(const Head&, const std::vector<int32_t>& indices, TokenRows& to) const;
    // Cached indices of the tokens of tiles [begin, end), in the order of tiles by their keys.
    std::vector<int32_t> grouped_order(size_t head, const Head&, int64_t begin, int64_t end) const;
    void group_tokens(size_t head, const Head&, std::vector<MovedToken>&, int64_t num_tiles) const;
    void write_compact(const Head&, CompactPlan&, const Claim&) const;
    void read_records(size_t head, const DumpedHead&, const uint8_t* tiles, std::vector<Record>&) const;
    void fill_tile(const Record&, uint8_t* tile) const;
    // Whether the positions are in order, which they must be but with recall.
    bool check_prefix(const Sequence&, int64_t num_tokens) const;
    void truncate_grouped(Sequence& forked, int64_t num_tokens);
    void truncate(Sequence& forked, const Sequence&, int64_t num_tokens, Claim&);

    StoreConfig config_;
    const Kernels* kernels_;
    ParallelFor parallel_;
    mutable std::mutex mutex_;
    std::vector<Layouts> layouts_;    // [layers]
    std::vector<size_t> first_head_;  // [layers + 1]
    std::vector<size_t> layer_of_;    // [heads]
    CodecPair recent_;                // of recent tiles
    Precisions default_precisions_;
    size_t captured_bytes_ = 0;  // part of what the arena counts
    Arena arena_;
    std::unordered_map<int32_t, std::unique_ptr<Sequence>> sequences_;
    int32_t last_id_ = 0;
};

// Stores by id, for the op: a stale int32 in the graph finds no store, where a stale pointer would be followed.
class StoreRegistry {
public:
    static int32_t add(std::shared_ptr<Store>);
    static std::shared_ptr<Store> find(int32_t id);  // throws std::invalid_argument "crush_store must be ..., got ..."
    static void remove(int32_t id);
};

}  // namespace crush
