// Sequences as numbers and bytes, for files: dump writes what a sequence holds, without addresses of this process; load
// checks everything that it reads.
//
// A tile is a record, numbers little endian: RecordHeader, positions of the tokens behind the first, the tile's parts
// in their order without the padding between them. Float codes are those of tokens only; quantised tiles are full. The
// number of tokens of a tile follows from the head: 32, but for the last one.
#include <algorithm>
#include <climits>
#include <cstring>

#include "store/require.hpp"
#include "store/store.hpp"
#include "store/tokens.hpp"

namespace crush {
namespace {

struct RecordHeader {
    uint8_t key, value;      // Codec
    uint8_t kind;            // flags, see Kind
    uint8_t position_bytes;  // of each position behind the first: 0 = they are consecutive, 1 and 2 = its distance
                             // from the one before, 4 = itself
    int32_t base;            // position of the first token
};
static_assert(sizeof(RecordHeader) == 8);

// Flags of the file. LISTED: how a tile stores positions, which decides its size, and which tokens can be appended in
// place. ROTATED: its values are, as all of u2 are that were not written before there was this flag.
enum Kind : uint8_t { LISTED = 1, ROTATED = 2, ALL_KINDS = 3 };

uint8_t kind_of(const TileLayout& l) {
    return static_cast<uint8_t>((l.listed ? LISTED : 0) | (l.rotation ? ROTATED : 0));
}

bool can_hold(uint8_t kind, const int32_t* positions, int count) {
    return kind & LISTED || !must_list(positions, count);
}

int position_bytes_for(const int32_t* positions, int count) {
    int64_t least = 1, most = 1;  // distances
    for (int i = 1; i < count; ++i) {
        const int64_t distance = static_cast<int64_t>(positions[i]) - positions[i - 1];
        least = std::min(least, distance);
        most = std::max(most, distance);
    }
    if (least < 0 || most > UINT16_MAX) return 4;
    return most > UINT8_MAX ? 2 : least == 1 && most == 1 ? 0 : 1;
}

size_t bytes_of(Codec codec, int numbers) {
    return static_cast<size_t>(numbers) * static_cast<size_t>(code_bits(codec)) / 8;
}

// Calls part(begin, bytes) for each piece of a tile of `count` tokens that is in its record, in order.
template <class Part>
void for_each_part(const TileLayout& l, int count, const Part& part) {
    if (count == TILE) {
        part(l.key_codes, bytes_of(l.key, l.head_size * TILE));
    } else {
        const size_t row = bytes_of(l.key, TILE), used = bytes_of(l.key, count);
        for (int c = 0; c < l.head_size; ++c) part(l.key_codes + static_cast<size_t>(c) * row, used);
    }
    if (is_quantised(l.key)) {
        const size_t bytes = 2 * static_cast<size_t>(l.head_size);
        part(l.key_scale, bytes);
        part(l.key_min, bytes);
    }
    part(l.value_codes, bytes_of(l.value, l.head_size * count));
    if (is_quantised(l.value)) {
        const size_t bytes = 2 * static_cast<size_t>(TILE * (l.head_size / l.group_size));
        part(l.value_scale, bytes);
        part(l.value_min, bytes);
    }
}

size_t payload_bytes(const TileLayout& l, int count) {
    size_t sum = 0;
    for_each_part(l, count, [&](size_t, size_t bytes) { sum += bytes; });
    return sum;
}

size_t num_filled(const Head& head) { return static_cast<size_t>((head.num_tokens + TILE - 1) / TILE); }

// -- writing ----------------------------------------------------------------------------------------------------------

size_t record_bytes(const uint8_t* tile) {
    const int count = header(tile).count;
    int32_t positions[TILE];
    read_positions(tile, positions);
    return sizeof(RecordHeader) + static_cast<size_t>(position_bytes_for(positions, count) * (count - 1)) +
           payload_bytes(layout(tile), count);
}

// Returns the end of what was written.
uint8_t* write_record(const uint8_t* tile, uint8_t* to) {
    const TileLayout& l = layout(tile);
    const int count = header(tile).count;
    int32_t positions[TILE];
    read_positions(tile, positions);
    const int width = position_bytes_for(positions, count);
    const RecordHeader head{static_cast<uint8_t>(l.key), static_cast<uint8_t>(l.value), kind_of(l),
                            static_cast<uint8_t>(width), positions[0]};
    const auto write = [&](const void* from, size_t bytes) {
        std::memcpy(to, from, bytes);
        to += bytes;
    };
    write(&head, sizeof(head));
    for (int i = 1; i < count && width; ++i) {
        const int32_t number = width == 4 ? positions[i] : positions[i] - positions[i - 1];
        write(&number, static_cast<size_t>(width));
    }
    for_each_part(l, count, [&](size_t begin, size_t bytes) { write(tile + begin, bytes); });
    return to;
}

// -- reading ----------------------------------------------------------------------------------------------------------

// Reads bytes once, front to back, and throws at the end.
struct ByteReader {
    const uint8_t* at;
    size_t left;

    const uint8_t* take(size_t bytes) {
        if (bytes > left) require(false, "tiles must hold " + std::to_string(bytes) + " bytes more of a head", left);
        const uint8_t* const from = at;
        at += bytes;
        left -= bytes;
        return from;
    }
};

}  // namespace

// A parsed record, checked but for the scales in its payload. The bytes of a mapped file may change under us: all that
// decides where to read and write is read once, into here.
struct Store::Record {
    const TileLayout* layout;
    const uint8_t* payload;
    int count;
    int32_t positions[TILE];
};

namespace {

void take_positions(const RecordHeader& head, ByteReader& from, int64_t next_position, int count, int32_t* to) {
    const int width = head.position_bytes;
    require(width == 0 || width == 1 || width == 2 || width == 4, "bytes of a position must be 0, 1, 2 or 4", width);
    const uint8_t* numbers = from.take(static_cast<size_t>(width * (count - 1)));
    int64_t position = head.base;
    for (int i = 0;; ++i) {
        if (position < 0 || position >= next_position) {
            require(false, "positions must be at least 0 and below " + std::to_string(next_position), position);
        }
        to[i] = static_cast<int32_t>(position);
        if (i == count - 1) return;
        int32_t number = width ? 0 : 1;
        std::memcpy(&number, numbers + width * i, static_cast<size_t>(width));
        position = width == 4 ? number : position + number;
    }
}

// Checks f16 numbers: the codecs write finite scales above 0 and finite minima.
void check_halves(const uint8_t* from, size_t bytes, bool is_scale) {
    constexpr uint16_t INFINITE = 0x7c00;
    for (size_t i = 0; i < bytes; i += 2) {
        uint16_t bits;
        std::memcpy(&bits, from + i, sizeof(bits));
        const bool finite = (bits & INFINITE) != INFINITE;
        if (is_scale) {
            require(finite && bits > 0 && bits < INFINITE, "scales must be finite and above 0", bits);
        } else {
            require(finite, "minima must be finite", bits);
        }
    }
}

void check_scales(const uint8_t* tile) {
    const TileLayout& l = layout(tile);
    for_each_part(l, header(tile).count, [&](size_t begin, size_t bytes) {
        const bool of_keys = is_quantised(l.key), of_values = is_quantised(l.value);
        const bool scale = (of_keys && begin == l.key_scale) || (of_values && begin == l.value_scale);
        const bool min = (of_keys && begin == l.key_min) || (of_values && begin == l.value_min);
        if (scale || min) check_halves(tile + begin, bytes, scale);
    });
}

// Of a target tile any codec that there is, of another one the store's recent one.
Codec check_codec(const char* of, uint8_t got, bool target, Codec recent) {
    const int own = static_cast<int>(recent);
    if (target && got >= NUM_CODECS) require(false, std::string(of) + " codec of a tile must be in 0..5", got);
    if (!target && got != own) {
        require(false, std::string(of) + " codec of a recent tile must be this store's " + std::to_string(own), got);
    }
    return static_cast<Codec>(got);
}

void check_head_row(const DumpedHead& row, size_t left, int64_t next_position) {
    require(row.num_tokens >= 0 && row.num_tokens <= INT_MAX, "tokens of a head must be in 0..2147483647",
            row.num_tokens);
    require(row.num_target >= 0 && row.num_target <= row.num_tokens / TILE,
            "target tiles of a head must be in 0.." + std::to_string(row.num_tokens / TILE), row.num_target);
    require(row.bytes >= 0 && static_cast<uint64_t>(row.bytes) <= left,
            "bytes of a head must be in 0.." + std::to_string(left), row.bytes);
    require(row.next_position == next_position && next_position >= 0 && next_position <= INT_MAX,
            "next_position must be in 0..2147483647, and the same for all heads", row.next_position);
    for (const int64_t codec : {row.key, row.value}) {
        require(codec >= 0 && codec < NUM_CODECS, "precisions of a head must be codecs in 0..5", codec);
    }
}

}  // namespace

// -- the store --------------------------------------------------------------------------------------------------------

Dump Store::dump(int32_t id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Sequence& sequence = sequence_locked(id);
    require(sequence.staged_tokens == 0, "sequence must be committed before it is dumped", id);
    Dump dump;
    std::vector<size_t> begins;
    size_t end = 0;
    for (size_t h = 0; h < sequence.heads.size(); ++h) {
        const Head& head = sequence.heads[h];
        begins.push_back(end);
        for (size_t i = 0; i < num_filled(head); ++i) end += record_bytes(head.tiles[i]);
        const CodecPair precisions = sequence.precisions[h];
        dump.heads.push_back({head.num_tokens, head.num_target, static_cast<int64_t>(end - begins.back()),
                              sequence.next_position, static_cast<int64_t>(precisions.key),
                              static_cast<int64_t>(precisions.value)});
    }
    dump.tiles.resize(end);
    run_parallel(sequence.heads.size(), [&](size_t h) {
        uint8_t* to = dump.tiles.data() + begins[h];
        const Head& head = sequence.heads[h];
        for (size_t i = 0; i < num_filled(head); ++i) to = write_record(head.tiles[i], to);
    });
    return dump;
}

void Store::read_records(size_t h, const DumpedHead& row, const uint8_t* tiles, std::vector<Record>& records) const {
    ByteReader from{tiles, static_cast<size_t>(row.bytes)};
    // num_tokens is not trusted: a record takes memory only once its bytes are read.
    for (int64_t begin = 0; begin < row.num_tokens; begin += TILE) {
        RecordHeader head;
        std::memcpy(&head, from.take(sizeof(head)), sizeof(head));
        Record record;
        const bool target = begin / TILE < row.num_target;
        const CodecPair codecs{check_codec("key", head.key, target, recent_.key),
                               check_codec("value", head.value, target, recent_.value)};
        const int most = codecs.value == Codec::u2 ? ALL_KINDS : LISTED;
        require(head.kind <= most, "kind of a tile must be in 0.." + std::to_string(most), head.kind);
        const bool listed = head.kind & LISTED, plain = codecs.value == Codec::u2 && !(head.kind & ROTATED);
        record.layout = plain ? &layouts_[layer_of_[h]].plain_u2[static_cast<size_t>(codecs.key)][listed]
                              : &layout_for(h, codecs, listed);
        record.count = static_cast<int>(std::min<int64_t>(TILE, row.num_tokens - begin));
        take_positions(head, from, row.next_position, record.count, record.positions);
        require(can_hold(head.kind, record.positions, record.count), "kind of a tile must be one for its positions",
                head.kind);
        record.payload = from.take(payload_bytes(*record.layout, record.count));
        records.push_back(record);
    }
    require(from.left == 0, "tiles must hold nothing beyond the records of a head", from.left);
}

void Store::fill_tile(const Record& record, uint8_t* tile) const {
    make_empty(tile, *record.layout);
    header(tile).count = record.count;
    for (int i = 0; i < record.count; ++i) set_position(tile, i, record.positions[i]);
    const uint8_t* from = record.payload;
    for_each_part(*record.layout, record.count, [&](size_t begin, size_t bytes) {
        std::memcpy(tile + begin, from, bytes);
        from += bytes;
    });
    check_scales(tile);
    if (record.count == TILE) kernels_->write_mean(tile);
}

int32_t Store::load(const std::vector<DumpedHead>& rows, const uint8_t* tiles, size_t num_bytes, int64_t capture_rows,
                    size_t promised) {
    auto sequence = new_sequence(capture_rows);
    const size_t num_heads = rows.size();
    require(num_heads == layer_of_.size(),
            "heads must have a row for each of the " + std::to_string(layer_of_.size()) + " KV heads of all layers",
            num_heads);
    std::vector<size_t> begins;
    size_t end = 0;
    for (const DumpedHead& row : rows) {
        check_head_row(row, num_bytes - end, rows[0].next_position);
        begins.push_back(end);
        end += static_cast<size_t>(row.bytes);
    }
    require(end == num_bytes, "tiles must have " + std::to_string(end) + " bytes, as heads tells", num_bytes);

    std::vector<std::vector<Record>> records(num_heads);
    run_parallel(num_heads, [&](size_t h) { read_records(h, rows[h], tiles + begins[h], records[h]); });
    sequence->next_position = rows[0].next_position;
    for (size_t h = 0; h < num_heads; ++h) {
        sequence->precisions[h] = {static_cast<Codec>(rows[h].key), static_cast<Codec>(rows[h].value)};
    }

    const std::lock_guard<std::mutex> lock(mutex_);
    Claim claim(arena_);
    std::vector<size_t> first;  // number of the first tile of each head in the claim
    for (size_t h = 0; h < num_heads; ++h) {
        first.push_back(claim.num_tiles());
        for (const Record& record : records[h]) claim.add(*record.layout);
    }
    grant(claim, promised);
    run_parallel(num_heads, [&](size_t h) {
        Head& head = sequence->heads[h];
        head.num_tokens = rows[h].num_tokens;
        head.num_target = rows[h].num_target;
        head.tiles.reserve(records[h].size());
        for (size_t i = 0; i < records[h].size(); ++i) {
            head.tiles.push_back(claim.tile(first[h] + i));
            fill_tile(records[h][i], head.tiles.back());
        }
    });
    sequences_.emplace(last_id_ + 1, std::move(sequence));
    claim.commit();
    return ++last_id_;
}

}  // namespace crush
