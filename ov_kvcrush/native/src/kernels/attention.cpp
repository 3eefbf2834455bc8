#include "kernels/attention.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/split.hpp"

namespace crush {

namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr size_t UNIT_ROWS = 64;  // query rows of a head that one task takes over its tiles, chunk by chunk

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// Query rows [first_row, first_row + rows) of one KV head of one span, numbered token by token, the G heads of a token
// together.
struct Unit {
    const AttendSpan* span;
    int head;
    size_t first_row, rows;
    size_t first_part, num_parts;
};

struct Part {
    size_t unit, first_tile, num_tiles;
    size_t state;  // of its running max, sum and acc: floats from the start of all states
};

// How the work is split depends on each request's own shape only, so its result does not depend on the rest of the
// batch.
struct WorkPlan {
    std::vector<Unit> units;
    std::vector<Part> parts;
    size_t state_floats = 0;

    WorkPlan(const LayerShape& shape, const std::vector<AttendSpan>& spans) {
        const size_t group = static_cast<size_t>(shape.num_heads / shape.num_kv_heads);
        for (const AttendSpan& span : spans)
            for (int head = 0; head < shape.num_kv_heads; ++head) {
                const size_t rows = span.num_rows * group, num_units = ceil_div(rows, UNIT_ROWS);
                for (size_t u = 0; u < num_units; ++u) {
                    const Split blocks{rows, num_units};
                    add(shape, span, head, blocks.begin(u), blocks.size(u), num_units);
                }
            }
    }

private:
    void add(const LayerShape& shape, const AttendSpan& span, int head, size_t first_row, size_t rows,
             size_t num_units) {
        const Split split = split_tiles(span.heads[head].num_tiles, num_units);
        units.push_back({&span, head, first_row, rows, parts.size(), split.parts});
        for (size_t p = 0; p < split.parts; ++p) {
            parts.push_back({units.size() - 1, split.begin(p), split.size(p), state_floats});
            if (split.parts > 1) state_floats += rows * static_cast<size_t>(shape.head_size + 2);
        }
    }
};

// Running max, sum and acc of some rows.
struct SoftmaxState {
    float *max, *sum, *acc;
    SoftmaxState(float* at, size_t rows) : max(at), sum(at + rows), acc(at + 2 * rows) {}
};

class AttendJob {
public:
    AttendJob(const Kernels& kernels, const LayerShape& shape, const std::vector<AttendSpan>& spans, const float* q,
              float* out)
        : kernels_(kernels),
          shape_(shape),
          size_(static_cast<size_t>(shape.head_size)),
          group_(static_cast<size_t>(shape.num_heads / shape.num_kv_heads)),
          plan_(shape, spans),
          q_(q),
          out_(out),
          states_(new float[plan_.state_floats]),
          open_parts_(new std::atomic<size_t>[plan_.units.size()]) {
        for (size_t u = 0; u < plan_.units.size(); ++u) open_parts_[u] = plan_.units[u].num_parts;
    }

    size_t num_parts() const { return plan_.parts.size(); }

    // One thread's share: parts as they come.
    void work() {
        std::vector<float> q(UNIT_ROWS * size_), state(UNIT_ROWS * (size_ + 2));
        std::vector<int32_t> positions(UNIT_ROWS);
        std::vector<float> slopes(shape_.slopes.empty() ? 0 : UNIT_ROWS);
        // The next part is claimed early, so that its tiles can be prefetched.
        size_t next = claim();
        while (next < plan_.parts.size()) {
            const Part& part = plan_.parts[next];
            next = claim();
            run(part, next < plan_.parts.size() ? &plan_.parts[next] : nullptr, q.data(), positions.data(),
                slopes.empty() ? nullptr : slopes.data(), state.data());
        }
    }

private:
    size_t claim() { return next_part_.fetch_add(1, std::memory_order_relaxed); }

    void run(const Part& part, const Part* next, float* q, int32_t* positions, float* slopes, float* own_state) {
        const Unit& unit = plan_.units[part.unit];
        const SoftmaxState state(unit.num_parts > 1 ? &states_[part.state] : own_state, unit.rows);
        std::fill_n(state.max, unit.rows, NONE);
        std::fill_n(state.sum, unit.rows, 0.f);
        std::fill_n(state.acc, unit.rows * size_, 0.f);
        load_rows(unit, q, positions, slopes);
        const size_t blocks = ceil_div(unit.rows, MAX_ROWS);
        // Several row blocks walk through the tiles chunk by chunk, so that they stay cached.
        const size_t step = blocks > 1 ? CHUNK : std::max<size_t>(part.num_tiles, 1);
        const HeadView& view = unit.span->heads[unit.head];
        int rotation[UNIT_ROWS / MAX_ROWS];
        std::fill_n(rotation, blocks, ANY_ROTATION);
        for (size_t tile = 0; tile < part.num_tiles; tile += step)
            for (size_t b = 0; b < blocks; ++b) {
                const size_t row = unit.rows * b / blocks, end = unit.rows * (b + 1) / blocks;
                AttendArgs args{};
                args.tiles = view.tiles + part.first_tile + tile;
                args.num_tiles = std::min(step, part.num_tiles - tile);
                const bool last = tile + args.num_tiles == part.num_tiles;
                if (b + 1 == blocks && !last) {
                    args.next_tiles = args.tiles + args.num_tiles;
                    args.num_next = part.num_tiles - tile - args.num_tiles;
                } else if (b + 1 == blocks && next) {
                    const Unit& after = plan_.units[next->unit];
                    args.next_tiles = after.span->heads[after.head].tiles + next->first_tile;
                    args.num_next = next->num_tiles;
                }
                args.rows = static_cast<int>(end - row);
                args.q = q + row * size_;
                args.row_position = positions + row;
                args.window = shape_.window;
                args.soft_cap = shape_.soft_cap;
                args.slope = slopes ? slopes + row : nullptr;
                args.max = state.max + row;
                args.sum = state.sum + row;
                args.acc = state.acc + row * size_;
                args.rotation = rotation + b;
                kernels_.attend(args);
                if (last && rotation[b] > 0) kernels_.rotate(args.acc, args.rows, shape_.head_size, rotation[b]);
            }
        // Whoever ends the last part merges all of them, in their order.
        if (unit.num_parts == 1)
            finish(unit, &state, 1);
        else if (open_parts_[part.unit].fetch_sub(1, std::memory_order_acq_rel) == 1)
            merge(unit);
    }

    size_t query_head(const Unit& unit, size_t row) const {
        return static_cast<size_t>(unit.head) * group_ + (unit.first_row + row) % group_;
    }
    size_t q_offset(const Unit& unit, size_t row) const {
        const size_t token = unit.span->row_begin + (unit.first_row + row) / group_;
        return (token * static_cast<size_t>(shape_.num_heads) + query_head(unit, row)) * size_;
    }

    void load_rows(const Unit& unit, float* q, int32_t* positions, float* slopes) const {
        for (size_t r = 0; r < unit.rows; ++r) {
            const float* from = q_ + q_offset(unit, r);
            for (size_t c = 0; c < size_; ++c) q[r * size_ + c] = from[c] * shape_.scale;
            positions[r] = unit.span->first_position + static_cast<int32_t>((unit.first_row + r) / group_);
            if (slopes) slopes[r] = shape_.slopes[query_head(unit, r)];
        }
    }

    void merge(const Unit& unit) const {
        std::vector<SoftmaxState> states;
        for (size_t p = 0; p < unit.num_parts; ++p)
            states.emplace_back(&states_[plan_.parts[unit.first_part + p].state], unit.rows);
        finish(unit, states.data(), states.size());
    }

    void finish(const Unit& unit, const SoftmaxState* states, size_t n) const {
        for (size_t r = 0; r < unit.rows; ++r) {
            float* to = out_ + q_offset(unit, r);
            float max = NONE, sum = 0.f;
            for (size_t p = 0; p < n; ++p) max = std::max(max, states[p].max[r]);
            std::fill_n(to, size_, 0.f);
            if (max == NONE) continue;  // a row that sees nothing
            if (!shape_.sinks.empty()) {
                const float sink = shape_.sinks[query_head(unit, r)];
                max = std::max(max, sink);
                sum = std::exp(sink - max);
            }
            for (size_t p = 0; p < n; ++p) {
                const float weight = std::exp(states[p].max[r] - max);
                const float* acc = states[p].acc + r * size_;
                sum += weight * states[p].sum[r];
                for (size_t c = 0; c < size_; ++c) to[c] += weight * acc[c];
            }
            for (size_t c = 0; c < size_; ++c) to[c] /= sum;
        }
    }

    const Kernels& kernels_;
    const LayerShape& shape_;
    const size_t size_, group_;
    const WorkPlan plan_;
    const float* q_;
    float* out_;
    std::unique_ptr<float[]> states_;
    std::unique_ptr<std::atomic<size_t>[]> open_parts_;
    std::atomic<size_t> next_part_{0};
};

void check_shape(const LayerShape& shape) {
    const auto is_per_head = [&](const std::vector<float>& x) {
        return x.empty() || x.size() == static_cast<size_t>(shape.num_heads);
    };
    if (!is_per_head(shape.slopes) || !is_per_head(shape.sinks))
        throw std::invalid_argument("slopes and sinks must be " + std::to_string(shape.num_heads) + " or none");
    if (shape.num_kv_heads < 1 || shape.num_heads < 1 || shape.num_heads % shape.num_kv_heads)
        throw std::invalid_argument("num_heads must be a multiple of num_kv_heads, got " +
                                    std::to_string(shape.num_heads) + " and " + std::to_string(shape.num_kv_heads));
}

// Scores of one query head: its rows in blocks, each softmaxed over all tokens and then reduced into out [tokens].
class HeadScores {
public:
    HeadScores(const Kernels& kernels, const LayerShape& shape, size_t head, const HeadView& view,
               const int32_t* row_position, size_t num_rows)
        : kernels_(kernels), shape_(shape), head_(head), view_(view), row_position_(row_position), num_rows_(num_rows) {
    }

    // q: the head's part of the first row, rows are H * D apart
    void run(const float* q, Reduce reduce, float* out) const {
        const size_t size = static_cast<size_t>(shape_.head_size), num_slots = view_.num_tiles * TILE;
        const size_t num_sinks = shape_.sinks.empty() ? 0 : 1, stride = num_slots + 16 * num_sinks;
        std::vector<float> scores(std::min<size_t>(MAX_ROWS, num_rows_) * stride), rows(MAX_ROWS * size),
            total(num_slots, 0.f);
        for (size_t from = 0; from < num_rows_; from += MAX_ROWS) {
            const size_t n = std::min<size_t>(MAX_ROWS, num_rows_ - from);
            for (size_t r = 0; r < n; ++r)
                for (size_t c = 0; c < size; ++c)
                    rows[r * size + c] =
                        q[(from + r) * static_cast<size_t>(shape_.num_heads) * size + c] * shape_.scale;
            kernels_.scores(view_.tiles, view_.num_tiles, rows.data(), static_cast<int>(n), scores.data(), stride);
            for (size_t r = 0; r < n; ++r) {
                float* s = scores.data() + r * stride;
                if (shape_.soft_cap > 0) kernels_.cap(s, num_slots, shape_.soft_cap);
                if (!shape_.slopes.empty()) add_slope(row_position_[from + r], s);
                mask(row_position_[from + r], s);
                if (num_sinks) s[num_slots] = shape_.sinks[head_];
                kernels_.softmax(s, num_slots + num_sinks);
                add(reduce, s, total.data());
            }
        }
        const float factor = reduce == Reduce::mean ? 1.f / static_cast<float>(std::max<size_t>(num_rows_, 1)) : 1.f;
        for (size_t i = 0; i < view_.num_tiles; ++i)
            for (int t = 0; t < header(view_.tiles[i]).count; ++t)
                *out++ = total[i * TILE + static_cast<size_t>(t)] * factor;
    }

private:
    void add_slope(int32_t row_position, float* s) const {
        const float slope = shape_.slopes[head_];
        for (size_t i = 0; i < view_.num_tiles; ++i, s += TILE) {
            int32_t at[TILE];
            read_positions(view_.tiles[i], at);
            for (int t = 0; t < header(view_.tiles[i]).count; ++t)
                s[t] += slope * static_cast<float>(at[t] - row_position);
        }
    }

    void mask(int32_t row_position, float* s) const {
        const int64_t low =
            shape_.window > 0 ? int64_t{row_position} - shape_.window : std::numeric_limits<int64_t>::min();
        for (size_t i = 0; i < view_.num_tiles; ++i, s += TILE) {
            const TileHeader& h = header(view_.tiles[i]);
            if (h.count == TILE && h.max_position <= row_position && h.min_position > low) continue;
            if (h.min_position > row_position || h.max_position <= low) {
                std::fill_n(s, TILE, NONE);
                continue;
            }
            int32_t at[TILE];
            read_positions(view_.tiles[i], at);
            for (int t = 0; t < TILE; ++t) {
                if (t >= h.count || at[t] > row_position || at[t] <= low) s[t] = NONE;
            }
        }
    }

    void add(Reduce reduce, const float* s, float* total) const {
        const size_t n = view_.num_tiles * TILE;
        if (reduce == Reduce::mean)
            for (size_t i = 0; i < n; ++i) total[i] += s[i];
        if (reduce == Reduce::max)
            for (size_t i = 0; i < n; ++i) total[i] = std::max(total[i], s[i]);
        if (reduce == Reduce::sum_squares)
            for (size_t i = 0; i < n; ++i) total[i] += s[i] * s[i];
    }

    const Kernels& kernels_;
    const LayerShape& shape_;
    const size_t head_;  // of the queries
    const HeadView& view_;
    const int32_t* row_position_;
    const size_t num_rows_;
};

}  // namespace

void attend(const Kernels& kernels, const LayerShape& shape, const std::vector<AttendSpan>& spans, const float* q,
            float* out, int num_threads, const ParallelFor& parallel) {
    check_shape(shape);
    AttendJob job(kernels, shape, spans, q, out);
    const size_t workers = std::min(static_cast<size_t>(std::max(num_threads, 1)), job.num_parts());
    if (workers <= 1)
        job.work();
    else
        parallel(workers, [&](size_t) { job.work(); });
}

size_t num_scores(const LayerShape& shape, const std::vector<HeadView>& heads) {
    size_t tokens = 0;
    for (const HeadView& head : heads) {
        for (size_t i = 0; i < head.num_tiles; ++i) tokens += static_cast<size_t>(header(head.tiles[i]).count);
    }
    return tokens * static_cast<size_t>(shape.num_heads / shape.num_kv_heads);
}

void attention_scores(const Kernels& kernels, const LayerShape& shape, const HeadView* heads, const float* q,
                      const int32_t* row_position, size_t num_rows, Reduce reduce, float* out,
                      const ParallelFor& parallel) {
    check_shape(shape);
    const size_t group = static_cast<size_t>(shape.num_heads / shape.num_kv_heads);
    std::vector<float*> to;  // [H]
    for (int k = 0; k < shape.num_kv_heads; ++k) {
        size_t tokens = 0;
        for (size_t i = 0; i < heads[k].num_tiles; ++i) tokens += static_cast<size_t>(header(heads[k].tiles[i]).count);
        for (size_t g = 0; g < group; ++g, out += tokens) to.push_back(out);
    }
    parallel(static_cast<size_t>(shape.num_heads), [&](size_t h) {
        const HeadScores scores(kernels, shape, h, heads[h / group], row_position, num_rows);
        scores.run(q + h * static_cast<size_t>(shape.head_size), reduce, to[h]);
    });
}

}  // namespace crush
