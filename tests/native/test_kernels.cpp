// Laws of the kernels, on every instruction set of this machine, against plain double precision. No framework: returns
// the number of laws that failed. Build with -fsanitize=address,undefined or -fsanitize=thread: it runs on std::thread.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/attention.hpp"
#include "kernels/half.hpp"
#include "store/tokens.hpp"

using namespace crush;

namespace {

const Codec CODECS[] = {Codec::f32, Codec::bf16, Codec::f16, Codec::u8, Codec::u4, Codec::u2};
const int HEAD_SIZES[] = {16, 32, 48, 64, 80, 96, 128, 256};
const int TOKENS[] = {0, 1, 31, 32, 33, 700};
const float INF = std::numeric_limits<float>::infinity();

// Under a sanitizer, which is slow, one of so many cases: still every codec and head size; races do not hide in codecs.
#if defined(__SANITIZE_THREAD__)
constexpr unsigned STEP = 41;
#elif defined(__SANITIZE_ADDRESS__)
constexpr unsigned STEP = 13;
#else
constexpr unsigned STEP = 1;
#endif

int failures = 0;

template <class... T>
void expect(bool ok, const char* format, T... args) {
    if (ok) return;
    if (++failures > 40) return;
    std::printf("FAILED ");
    std::printf(format, args...);
    std::printf("\n");
}

using Rng = std::mt19937;
// Nearly normal, in [-3.5, 3.5]: the sum of the four bytes of a draw.
float normal(Rng& rng) {
    const uint32_t x = static_cast<uint32_t>(rng());
    return (static_cast<float>((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)) - 510.f) / 147.8f;
}
int below(Rng& rng, int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }

void parallel(size_t n, const std::function<void(size_t)>& task) {
    std::vector<std::thread> threads;
    for (size_t i = 1; i < n; ++i) threads.emplace_back(task, i);
    if (n) task(0);
    for (std::thread& t : threads) t.join();
}
void threads4(size_t n, const std::function<void(size_t)>& task) {
    std::atomic<size_t> next{0};
    parallel(std::min<size_t>(n, 4), [&](size_t) {
        for (size_t i; (i = next++) < n;) task(i);
    });
}

struct FreeTile {
    void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{ALIGNMENT}); }
};
using Tile = std::unique_ptr<uint8_t[], FreeTile>;

// Exactly as many bytes as the layout says, so that a sanitizer sees a read beyond them.
Tile new_tile(const TileLayout& l) {
    Tile tile(static_cast<uint8_t*>(::operator new[](l.bytes, std::align_val_t{ALIGNMENT})));
    std::memset(tile.get(), 0xa5, l.bytes);
    new (tile.get()) TileHeader{};
    header(tile.get()).layout = &l;
    header(tile.get()).refs = 1;
    return tile;
}

float float_at(Codec codec, const uint8_t* p, int i) {
    float f;
    uint16_t h;
    std::memcpy(&f, p + (codec == Codec::f32 ? 4 * i : 0), 4);
    std::memcpy(&h, p + (codec == Codec::f32 ? 0 : 2 * i), 2);
    return codec == Codec::f32 ? f : codec == Codec::bf16 ? float_of_bits(uint32_t{h} << 16) : float_of_half(h);
}
// Code of row r, column c of a matrix that is contracted over its rows.
int code_at(Codec codec, const uint8_t* p, int r, int c, int columns) {
    const int bits = code_bits(codec), n = 32 / bits, i = r % n;
    uint32_t dword;
    std::memcpy(&dword, p + 4 * (r / n * columns + c), 4);
    return static_cast<int>(dword >> (8 * (i % 4) + bits * (i / 4)) & ((1u << bits) - 1));
}
float half_at(const uint8_t* p, int i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    return float_of_half(h);
}
// What tile.hpp says about the bytes.
float key_of(const uint8_t* tile, int t, int c) {
    const TileLayout& l = layout(tile);
    const uint8_t* codes = tile + l.key_codes;
    if (!is_quantised(l.key)) return float_at(l.key, codes, c * TILE + t);
    const float code = static_cast<float>(code_at(l.key, codes, c, t, TILE));
    return half_at(tile + l.key_min, c) + code * half_at(tile + l.key_scale, c);
}
float value_of(const uint8_t* tile, int t, int c) {
    const TileLayout& l = layout(tile);
    const uint8_t* codes = tile + l.value_codes;
    if (!is_quantised(l.value)) return float_at(l.value, codes, t * l.head_size + c);
    const int group = c / l.group_size * TILE + t;
    const float code = static_cast<float>(code_at(l.value, codes, t, c, l.head_size));
    return half_at(tile + l.value_min, group) + code * half_at(tile + l.value_scale, group);
}

// Values [D] of a token as they are stored, or as they are: the transform is its own inverse. (By its definition:
// entry i, j of the matrix is -1 to the number of bits that i and j share.)
std::vector<double> rotated(const TileLayout& l, std::vector<double> x) {
    const std::vector<double> from = x;
    const auto block = static_cast<size_t>(l.rotation);
    for (size_t c = 0; block && c < x.size(); ++c) {
        x[c] = 0;
        for (size_t j = 0; j < block; ++j) {
            size_t shared = c % block & j;
            double sign = 1;
            for (; shared; shared &= shared - 1) sign = -sign;
            x[c] += sign * from[c / block * block + j] / std::sqrt(static_cast<double>(block));
        }
    }
    return x;
}
std::vector<double> values_of(const uint8_t* tile, int t) {
    std::vector<double> stored;
    for (int c = 0; c < layout(tile).head_size; ++c) stored.push_back(value_of(tile, t, c));
    return rotated(layout(tile), stored);
}

// How far a token is behind the one before it: 1 or up to these, and one more than MAX_GAP in each tile with `large`.
enum class Gaps { none = 1, small = 3, large = MAX_GAP, listed = 4 * MAX_GAP };

TileLayout layout_of(Codec key, Codec value, int head_size, int group_size, Gaps gaps) {
    return make_layout(key, value, head_size, group_size, gaps == Gaps::listed);
}

// A head: mostly tiles of one layout, then of another; the positions are what was added.
struct TestHead {
    std::vector<Tile> tiles;
    std::vector<const uint8_t*> pointers;
    std::vector<int32_t> positions;  // [n]
    std::vector<float> k, v;         // [n][D] as stored
    HeadView view() const { return {pointers.data(), pointers.size()}; }

    TestHead(const Kernels& kernels, const TileLayout& target, const TileLayout& recent, Gaps gaps, int n, Rng& rng) {
        const int D = target.head_size, settled = n > 96 ? (n - 40) / TILE : n / TILE;
        int32_t at = -1;
        for (int first = 0; first < n; first += TILE) {
            const TileLayout& l = first / TILE < settled ? target : recent;
            const int count = std::min(TILE, n - first);
            tiles.push_back(new_tile(l));
            uint8_t* tile = tiles.back().get();
            const int far = below(rng, TILE);
            header(tile).count = count;
            header(tile).min_position = std::numeric_limits<int32_t>::max();
            header(tile).max_position = -1;
            std::vector<float> x(static_cast<size_t>(count * D)), y(x.size());
            // Channel 3 of the keys is an outlier, as in real models; values are not centred.
            for (size_t i = 0; i < x.size(); ++i) x[i] = normal(rng) * (static_cast<int>(i) % D == 3 ? 10.f : 1.f);
            for (float& f : y) f = normal(rng) + 1;
            kernels.encode(tile, x.data(), static_cast<size_t>(D), y.data(), static_cast<size_t>(D), count);
            for (int t = 0; t < count; ++t) {
                at += 1 + below(rng, below(rng, 3) ? 1 : static_cast<int>(gaps));
                if (gaps == Gaps::large && t == far) at += MAX_GAP;
                positions.push_back(at);
                set_position(tile, t, at);
                for (int c = 0; c < D; ++c) k.push_back(key_of(tile, t, c));
                for (const double value : values_of(tile, t)) v.push_back(static_cast<float>(value));
            }
            int32_t back[TILE];
            read_positions(tile, back);
            expect(std::equal(back, back + count, &positions[static_cast<size_t>(first)]), "positions of tile %d",
                   first);
            pointers.push_back(tile);
        }
    }
};

// Probabilities of a row over the tokens of a head; all zero if it sees none.
std::vector<double> probabilities(const std::vector<float>& keys, const std::vector<int32_t>& positions, const float* q,
                                  const LayerShape& shape, int32_t row_position, size_t query_head = 0) {
    std::vector<double> p(positions.size(), 0);
    const size_t size = static_cast<size_t>(shape.head_size);
    double max = -INF, sum = 0;
    for (size_t t = 0; t < p.size(); ++t) {
        const float* k = keys.data() + t * size;
        double dot = 0;
        for (size_t c = 0; c < size; ++c) dot += double{k[c]} * q[c];
        p[t] = dot * shape.scale;
        const int32_t at = positions[t];
        if (shape.soft_cap > 0) p[t] = shape.soft_cap * std::tanh(p[t] / shape.soft_cap);
        if (!shape.slopes.empty()) p[t] += double{shape.slopes[query_head]} * (at - row_position);
        if (at > row_position || (shape.window > 0 && at <= row_position - shape.window)) p[t] = -INF;
        max = std::max(max, p[t]);
    }
    const double sink = shape.sinks.empty() ? -INF : shape.sinks[query_head];
    max = std::max(max, sink);
    for (double& x : p) sum += x = max == -INF ? 0 : std::exp(x - max);
    if (sink > -INF) sum += std::exp(sink - max);
    for (double& x : p) x = sum > 0 ? x / sum : 0;
    return p;
}

std::vector<double> probabilities(const TestHead& head, const float* q, const LayerShape& shape, int32_t row_position) {
    return probabilities(head.k, head.positions, q, shape, row_position);
}

// How far the attention of a row over quantised tiles may be off because scaled queries are 16-bit integers: five standard deviations of a logit's error, at the largest value. See DIGITS_ERROR in native_stores.py.
double rounding(const Kernels& kernels, Codec key, Codec value, const TestHead& head, const float* q,
                const LayerShape& shape) {
    if (std::string(kernels.isa) == "scalar" || !is_quantised(key) || !is_quantised(value)) return 0;
    const size_t size = static_cast<size_t>(shape.head_size);
    double most = 0, largest = 0;
    for (size_t c = 0; c < size; ++c) {
        double low = INF, high = -INF;
        for (size_t i = c; i < head.k.size(); i += size) {
            low = std::min(low, double{head.k[i]});
            high = std::max(high, double{head.k[i]});
            largest = std::max(largest, std::abs(double{head.v[i]}));
        }
        if (high > low) most = std::max(most, std::abs(q[c]) * shape.scale * (high - low));
    }
    return 2.6e-5 * std::sqrt(static_cast<double>(size)) * most * largest;
}

// Sum of p * v: [D].
std::vector<double> weighted(const TestHead& head, const std::vector<double>& p, size_t size) {
    std::vector<double> out(size, 0);
    for (size_t t = 0; t < p.size(); ++t)
        for (size_t c = 0; c < size; ++c) out[c] += p[t] * head.v[t * size + c];
    return out;
}

struct Request {
    std::vector<TestHead> heads;
    std::vector<HeadView> views;
    AttendSpan span;
};

struct Case {
    Codec key, value;
    int head_size, group_size, queries_per_kv, window;
    Gaps gaps;
};

std::string name_of(const char* isa, const Case& c) {
    return std::string(isa) + " key " + std::to_string(int(c.key)) + " value " + std::to_string(int(c.value)) + " D " +
           std::to_string(c.head_size) + " group " + std::to_string(c.group_size) + " G " +
           std::to_string(c.queries_per_kv) + " window " + std::to_string(c.window) + " gaps " +
           std::to_string(int(c.gaps));
}

void check_attend(const Kernels& kernels, const Case& c, unsigned seed) {
    Rng rng(seed);
    const int K = 2, H = K * c.queries_per_kv, D = c.head_size;
    const LayerShape shape{H, K, D, c.window, 1.f / std::sqrt(static_cast<float>(D))};
    const TileLayout target = layout_of(c.key, c.value, D, c.group_size, c.gaps);
    const TileLayout recent = layout_of(Codec::bf16, Codec::f16, D, c.group_size, c.gaps);
    // Requests of different lengths and numbers of rows, the heads of one not of the same length.
    std::vector<Request> requests;
    size_t num_rows = 0;
    for (int i = 0; i < 3; ++i) {
        Request r;
        const int tokens = TOKENS[(seed + static_cast<unsigned>(i) * 5) % 6];
        for (int k = 0; k < K; ++k)
            r.heads.emplace_back(kernels, target, recent, c.gaps, tokens > 40 ? tokens - k * 17 : tokens, rng);
        const int32_t last = r.heads[0].positions.empty() ? 0 : r.heads[0].positions.back();
        const size_t rows = i == 0 ? 1 : i == 1 ? 3 : 1 + seed % 7;
        // The last rows of the sequence, as in decoding; those of request 2 begin before all tokens, so some may see
        // nothing.
        r.span = {nullptr, num_rows, rows, i == 2 ? -1 : std::max(0, last - static_cast<int32_t>(rows) + 1)};
        num_rows += rows;
        requests.push_back(std::move(r));
    }
    std::vector<AttendSpan> spans;
    for (Request& r : requests) {
        for (const TestHead& head : r.heads) r.views.push_back(head.view());
        r.span.heads = r.views.data();
        spans.push_back(r.span);
    }
    std::vector<float> q(num_rows * static_cast<size_t>(H * D)), out(q.size(), 7.f), again(q.size(), 8.f),
        alone(q.size(), 9.f);
    for (float& f : q) f = 2 * normal(rng);
    attend(kernels, shape, spans, q.data(), out.data(), 1, threads4);
    attend(kernels, shape, spans, q.data(), again.data(), 4, threads4);
    for (const AttendSpan& span : spans) attend(kernels, shape, {span}, q.data(), alone.data(), 2, threads4);
    const std::string name = name_of(kernels.isa, c);
    expect(out == again, "%s: threads change the result", name.c_str());
    expect(out == alone, "%s: the batch changes the result", name.c_str());
    double error = 0, scale = 0, slack = 0;
    for (const Request& r : requests)
        for (size_t row = 0; row < r.span.num_rows; ++row)
            for (int h = 0; h < H; ++h) {
                const TestHead& head = r.heads[static_cast<size_t>(h / c.queries_per_kv)];
                const size_t at = (r.span.row_begin + row) * static_cast<size_t>(H * D) + static_cast<size_t>(h * D);
                const auto p = probabilities(head, &q[at], shape, r.span.first_position + static_cast<int32_t>(row));
                const auto expected = weighted(head, p, static_cast<size_t>(D));
                slack = std::max(slack, rounding(kernels, c.key, c.value, head, &q[at], shape));
                for (size_t d = 0; d < expected.size(); ++d) {
                    const double got = out[at + d];
                    error = std::isfinite(got) ? std::max(error, std::abs(got - expected[d])) : INF;
                    scale = std::max(scale, std::abs(expected[d]));
                }
            }
    expect(error <= 1e-4 * scale + slack, "%s: attend error %g of %g", name.c_str(), error, scale);
}

void check_scores(const Kernels& kernels, const Case& c, unsigned seed) {
    Rng rng(seed);
    const int K = 2, H = K * c.queries_per_kv, D = c.head_size, W = 1 + static_cast<int>(seed % 11);
    const LayerShape shape{H, K, D, c.window, 0.2f};
    const TileLayout target = layout_of(c.key, c.value, D, c.group_size, c.gaps);
    const TileLayout recent = layout_of(Codec::f32, Codec::f32, D, c.group_size, c.gaps);
    std::vector<TestHead> heads;
    std::vector<HeadView> views;
    for (int k = 0; k < K; ++k)
        heads.emplace_back(kernels, target, recent, c.gaps, TOKENS[(seed + static_cast<unsigned>(k)) % 6] % 300, rng);
    for (const TestHead& head : heads) views.push_back(head.view());
    std::vector<float> q(static_cast<size_t>(W * H * D));
    for (float& f : q) f = normal(rng);
    std::vector<int32_t> positions;
    for (int w = 0; w < W; ++w) positions.push_back(w * 20 - 5);
    const size_t n = static_cast<size_t>(c.queries_per_kv) * (heads[0].positions.size() + heads[1].positions.size());
    for (const Reduce reduce : {Reduce::mean, Reduce::max, Reduce::sum_squares}) {
        std::vector<float> out(n, 7.f);
        attention_scores(kernels, shape, views.data(), q.data(), positions.data(), static_cast<size_t>(W), reduce,
                         out.data(), threads4);
        double error = 0;
        size_t at = 0;
        for (int h = 0; h < H; ++h) {
            const TestHead& head = heads[static_cast<size_t>(h / c.queries_per_kv)];
            std::vector<double> total(head.positions.size(), 0);
            for (int w = 0; w < W; ++w) {
                const auto p = probabilities(head, &q[static_cast<size_t>((w * H + h) * D)], shape,
                                             positions[static_cast<size_t>(w)]);
                for (size_t t = 0; t < p.size(); ++t)
                    total[t] = reduce == Reduce::mean  ? total[t] + p[t] / W
                               : reduce == Reduce::max ? std::max(total[t], p[t])
                                                       : total[t] + p[t] * p[t];
            }
            for (const double x : total) error = std::max(error, std::abs(out[at++] - x));
        }
        expect(error <= 1e-5, "%s: scores, reduce %d, error %g", name_of(kernels.isa, c).c_str(), int(reduce), error);
    }
}

// Scores over blocks of bf16 keys, which lie in any order and not aligned; beyond the last token they are NaN.
void check_staged_scores(const Kernels& kernels, int D, unsigned seed) {
    Rng rng(seed);
    const int G = 1 + static_cast<int>(seed % 8), W = 1 + static_cast<int>(seed * 7 % 40), H = G + 1;
    const int window = seed % 3 == 0 ? 40 : 0;
    const size_t n = static_cast<size_t>(std::max(1, TOKENS[seed % 6])), size = static_cast<size_t>(D);
    const size_t num_blocks = (n + TILE - 1) / TILE;
    std::vector<std::vector<uint16_t>> blocks(num_blocks, std::vector<uint16_t>(TILE * size, 0x7fc0));
    std::vector<const uint8_t*> at;
    std::vector<float> keys, q(static_cast<size_t>(W * H * D)), scratch(staged_scratch(n));
    for (size_t t = 0; t < n; ++t)
        for (size_t c = 0; c < size; ++c) {
            const auto bits = static_cast<uint16_t>(bits_of_float(normal(rng)) >> 16);
            blocks[t / TILE][t % TILE * size + c] = bits;
            keys.push_back(float_of_bits(uint32_t{bits} << 16));
        }
    for (const auto& block : blocks) at.push_back(reinterpret_cast<const uint8_t*>(block.data()));
    // Numbers of one, two or three parts.
    const uint32_t kept = seed % 3 == 0 ? 0xffff0000u : seed % 3 == 1 ? 0xffffff00u : 0xffffffffu;
    for (float& f : q) f = float_of_bits(bits_of_float(normal(rng)) & kept);
    std::vector<int32_t> positions, tokens(n);
    std::iota(tokens.begin(), tokens.end(), 0);
    for (int w = 0; w < W; ++w) positions.push_back(static_cast<int32_t>(n) - W + w);
    const float scale = std::vector<float>{0.2f, -0.1f, 0.f, 20.f}[seed % 4];
    const LayerShape shape{G, 1, D, window, scale};
    std::vector<double> p;  // [G, W, n]
    for (int h = 0; h < G; ++h)
        for (int w = 0; w < W; ++w) {
            const float* row = &q[static_cast<size_t>((w * H + h) * D)];
            const auto of_row = probabilities(keys, tokens, row, shape, positions[static_cast<size_t>(w)]);
            p.insert(p.end(), of_row.begin(), of_row.end());
        }
    for (const Reduce reduce : {Reduce::mean, Reduce::max, Reduce::sum_squares}) {
        std::vector<float> out(static_cast<size_t>(G) * n);
        kernels.staged_scores({at.data(), n, D, q.data(), static_cast<size_t>(H * D), G, W, positions.data(), window,
                               scale, reduce, scratch.data(), out.data()});
        double error = 0;
        for (size_t i = 0; i < out.size(); ++i) {
            double total = 0;
            for (size_t w = 0; w < static_cast<size_t>(W); ++w) {
                const double x = p[(i / n * static_cast<size_t>(W) + w) * n + i % n];
                total = reduce == Reduce::mean  ? total + x / W
                        : reduce == Reduce::max ? std::max(total, x)
                                                : total + x * x;
            }
            error = std::isfinite(out[i]) ? std::max(error, std::abs(out[i] - total)) : INF;
        }
        // Logits of some hundreds are themselves rounded.
        const double bound = (scale > 1 ? 1e-3 : 1e-5) * (reduce == Reduce::sum_squares ? W : 1);
        expect(error <= bound, "%s: staged scores, D %d G %d W %d tokens %zu window %d scale %g reduce %d, error %g",
               kernels.isa, D, G, W, n, window, static_cast<double>(scale), int(reduce), error);
    }
}

// Rows of a prompt over blocks of bf16, which lie in any order; beyond the last token they are NaN.
void check_prefill(const Kernels& kernels, int D, unsigned seed) {
    Rng rng(seed);
    const int G = 1 + static_cast<int>(seed % 8), rows = 1 + static_cast<int>(seed * 7 % 31);
    const int window = seed % 3 == 0 ? 40 : 0, first = seed % 4 ? static_cast<int>(seed * 37 % 300) : 0;
    const size_t n = static_cast<size_t>(first + rows), size = static_cast<size_t>(D),
                 stride = static_cast<size_t>(G * D) + 3;
    const float scale = seed % 5 ? 0.2f : 5.f;
    std::vector<float> of_tokens[2], scratch(prefill_scratch(D, G * rows));
    std::vector<std::vector<uint16_t>> blocks(2 * ((n + TILE - 1) / TILE), std::vector<uint16_t>(TILE * size, 0x7fc0));
    std::vector<const uint8_t*> at[2];
    for (size_t kind = 0; kind < 2; ++kind)
        for (size_t t = 0; t < n; ++t) {
            auto& block = blocks[2 * (t / TILE) + kind];
            if (t % TILE == 0) at[kind].push_back(reinterpret_cast<const uint8_t*>(block.data()));
            for (size_t c = 0; c < size; ++c) {
                const auto bits = static_cast<uint16_t>(bits_of_float(normal(rng)) >> 16);
                block[t % TILE * size + c] = bits;
                of_tokens[kind].push_back(float_of_bits(uint32_t{bits} << 16));
            }
        }
    std::vector<float> q(static_cast<size_t>(rows) * stride), out(q.size(), 77.f);
    for (float& f : q) f = float_of_bits(bits_of_float(normal(rng)) & 0xffff0000u);
    LayerShape shape{G, 1, D, window, scale};
    if (seed % 2) shape.soft_cap = 3;
    for (int g = 0; g < G && seed % 7 < 3; ++g) shape.slopes.push_back(0.1f * static_cast<float>(g));
    for (int g = 0; g < G && seed % 5 < 3; ++g) shape.sinks.push_back(2.f - static_cast<float>(g));
    kernels.prefill({at[0].data(), at[1].data(), n, D, G, rows, q.data(), stride, first, window, scale, shape.soft_cap,
                     shape.slopes.empty() ? nullptr : shape.slopes.data(),
                     shape.sinks.empty() ? nullptr : shape.sinks.data(), scratch.data(), out.data()});
    std::vector<int32_t> tokens(n);
    std::iota(tokens.begin(), tokens.end(), 0);
    double error = 0;
    for (int r = 0; r < rows; ++r)
        for (int g = 0; g < G; ++g) {
            const size_t from = static_cast<size_t>(r) * stride + static_cast<size_t>(g * D);
            const auto p =
                probabilities(of_tokens[0], tokens, &q[from], shape, first + r, static_cast<size_t>(g));
            for (size_t c = 0; c < size; ++c) {
                double expected = 0;
                for (size_t t = 0; t < n; ++t) expected += p[t] * of_tokens[1][t * size + c];
                error = std::isfinite(out[from + c]) ? std::max(error, std::abs(out[from + c] - expected)) : INF;
            }
        }
    for (size_t i = 0; i < out.size(); ++i)  // between the rows
        if (i % stride >= static_cast<size_t>(G * D) && !(out[i] == 77.f)) error = INF;
    // Powers are rounded to 2^-9 of each, values are below 5.
    expect(error <= 5. / 256, "%s: prefill, D %d G %d rows %d from %d window %d scale %g, error %g", kernels.isa, D, G,
           rows, first, window, static_cast<double>(scale), error);
}

// Encoded values stay within half a step; every instruction set writes the same bytes; decode reads what tile.hpp says.
void check_codec(const Kernels& kernels, const Case& c, unsigned seed) {
    Rng rng(seed);
    const int D = c.head_size, count = below(rng, 4) ? TILE : below(rng, TILE + 1);
    const size_t n = static_cast<size_t>(TILE * D);
    std::vector<float> x(n), y(n), k(n), v(n);
    const unsigned kind = seed % 5;
    for (size_t i = 0; i < n; ++i) {
        x[i] = kind == 0 ? 3.f : kind == 1 ? static_cast<float>(i) * 0.01f : normal(rng) * (kind == 2 ? 1e-8f : 1.f);
        if (kind == 3 && below(rng, 20) == 0) x[i] *= 1e5f;
        y[i] = -x[i];
    }
    const TileLayout l = layout_of(c.key, c.value, D, c.group_size, c.gaps);
    const Tile tile = new_tile(l), other = new_tile(l);
    header(tile.get()).count = header(other.get()).count = count;
    const size_t stride = static_cast<size_t>(D);
    kernels.encode(tile.get(), x.data(), stride, y.data(), stride, count);
    crush::kernels("scalar").encode(other.get(), x.data(), stride, y.data(), stride, count);
    const std::string name = name_of(kernels.isa, c);
    expect(!std::memcmp(tile.get() + 64, other.get() + 64, l.bytes - 64), "%s kind %u: other bytes than scalar",
           name.c_str(), kind);
    kernels.decode(tile.get(), k.data(), v.data());
    const auto clamped = [](Codec codec, double a) {
        return codec == Codec::f32 || codec == Codec::bf16 ? a : std::min(std::max(a, -65504.), 65504.);
    };
    const auto bound = [](Codec codec, double a, double scale) {
        return codec == Codec::f32    ? 0.
               : codec == Codec::bf16 ? std::abs(a) / 256
               : codec == Codec::f16  ? std::max(std::abs(a) / 2048, 3e-8)
                                      : scale / 2 * 1.0001 + std::abs(a) * 1e-6;
    };
    for (int t = 0; t < TILE; ++t) {
        const std::vector<double> plain = values_of(tile.get(), t);
        std::vector<double> given;
        for (int d = 0; d < D; ++d) given.push_back(clamped(c.value, y[static_cast<size_t>(t * D + d)]));
        const double norm = std::sqrt(std::inner_product(given.begin(), given.end(), given.begin(), 0.));
        given = rotated(l, given);
        for (int d = 0; d < D; ++d) {
            const size_t i = static_cast<size_t>(t * D + d);
            const float key = key_of(tile.get(), t, d), value = value_of(tile.get(), t, d);
            const double ulp = 1e-6, of_value = std::abs(v[i] - plain[static_cast<size_t>(d)]);
            expect(std::abs(k[i] - key) <= ulp * std::abs(key) + 0.01 &&
                       of_value <= ulp * std::abs(plain[static_cast<size_t>(d)]) + (l.rotation ? 0.05 : 0.01) &&
                       (kind == 3 || (std::abs(k[i] - key) <= 1e-4 && of_value <= 1e-4)),
                   "%s: decode of token %d channel %d", name.c_str(), t, d);
            if (t >= count) continue;
            const double a = clamped(c.key, x[i]), b = clamped(c.value, given[static_cast<size_t>(d)]);
            const double key_scale = is_quantised(c.key) ? half_at(tile.get() + l.key_scale, d) : 0;
            const double value_scale =
                is_quantised(c.value) ? half_at(tile.get() + l.value_scale, d / c.group_size * TILE + t) : 0;
            // Float32 rounding of values up to 65504, and of a rotation: of 8 sums, each within the length of the row
            const double slack = (kind == 3 ? 0.02 : 0) + (l.rotation ? 1e-6 * norm : 0);
            expect(std::abs(key - a) <= bound(c.key, a, key_scale) + slack, "%s kind %u: key %g for %g, scale %g",
                   name.c_str(), kind, key, a, key_scale);
            expect(std::abs(value - b) <= bound(c.value, b, value_scale) + slack,
                   "%s kind %u: value %g for %g, scale %g", name.c_str(), kind, value, b, value_scale);
        }
    }
    if (is_quantised(c.key) || is_quantised(c.value)) return;
    kernels.encode(other.get(), x.data(), stride, y.data(), stride, 0);
    for (int t = 0; t < count; ++t)
        kernels.append_token(other.get(), t, &x[static_cast<size_t>(t * D)], &y[static_cast<size_t>(t * D)]);
    expect(!std::memcmp(tile.get() + 64, other.get() + 64, l.bytes - 64), "%s: append_token is not encode",
           name.c_str());
}

void check_half() {
    Rng rng(1);
    for (uint32_t h = 0; h < 0x7c00; ++h)
        for (const uint32_t sign : {0u, 0x8000u}) {
            const uint16_t x = static_cast<uint16_t>(h | sign);
            for (const Rounding r : {Rounding::nearest, Rounding::down, Rounding::up})
                expect(half_of_float(float_of_half(x), r) == x, "half %x does not come back", x);
        }
    for (int i = 0; i < 200000; ++i) {
        const float x = std::ldexp(normal(rng), below(rng, 45) - 32);
        if (std::abs(x) > 65504.f) continue;
        const float down = float_of_half(half_of_float(x, Rounding::down)),
                    up = float_of_half(half_of_float(x, Rounding::up));
        const float near = float_of_half(half_of_float(x, Rounding::nearest));
        const float middle = std::abs(near - x);
        const bool neighbours = down == up || float_of_half(half_of_float((down + up) / 2, Rounding::up)) == up;
        expect(down <= x && x <= up && neighbours && middle <= x - down && middle <= up - x, "half of %g: %g %g %g", x,
               down, near, up);
    }
}

void check_softmax(const Kernels& kernels) {
    Rng rng(2);
    for (size_t n : {0, 1, 15, 16, 17, 1000}) {
        std::vector<float> s(n), none(n, -INF);
        for (float& f : s) f = below(rng, 5) ? 10 * normal(rng) : -INF;
        if (n) s[0] = 1;
        std::vector<double> p(s.begin(), s.end());
        double max = -INF, sum = 0, error = 0;
        for (double x : p) max = std::max(max, x);
        for (double& x : p) sum += x = std::exp(x - max);
        kernels.softmax(s.data(), n);
        kernels.softmax(none.data(), n);
        for (size_t i = 0; i < n; ++i)
            error = std::max({error, std::abs(p[i] / sum - s[i]), double{std::abs(none[i])}});
        expect(error < 1e-6, "%s: softmax of %zu, error %g", kernels.isa, n, error);
    }
}

template <class F>
void expect_invalid(const char* what, F f) {
    try {
        f();
    } catch (const std::invalid_argument& e) {
        expect(std::strstr(e.what(), what) && std::strstr(e.what(), "got"), "message: %s", e.what());
        return;
    }
    expect(false, "no error: %s", what);
}

void check_errors() {
    expect_invalid("isa", [] { crush::kernels("nonsense"); });
    for (int size : {0, 8, 24, 272, -16})
        expect_invalid("head_size", [=] { make_layout(Codec::u8, Codec::u8, size, 16, false); });
    for (int group : {0, 8, 24, 48, 128})
        expect_invalid("group_size", [=] { make_layout(Codec::u8, Codec::u8, 64, group, false); });
    expect_invalid("num_heads",
                   [] { attend(crush::kernels(), {7, 2, 64, 0, 1.f}, {}, nullptr, nullptr, 1, threads4); });
}

// 100 rows of a later turn over a few hundred tokens: units of rows, several row blocks each.
void check_many_rows(const Kernels& kernels, Codec codec, int window) {
    Rng rng(3);
    const LayerShape shape{6, 2, 64, window, 0.125f};
    const TileLayout target = make_layout(codec, codec, 64, 32, false),
                     recent = make_layout(Codec::bf16, Codec::bf16, 64, 32, false);
    std::vector<TestHead> heads;
    std::vector<HeadView> views;
    for (int k = 0; k < 2; ++k) heads.emplace_back(kernels, target, recent, Gaps::none, 1300, rng);
    for (const TestHead& head : heads) views.push_back(head.view());
    const size_t rows = 211, width = 6 * 64;
    std::vector<float> q(rows * width), out(q.size());
    for (float& f : q) f = normal(rng);
    attend(kernels, shape, {{views.data(), 0, rows, 1300 - 211}}, q.data(), out.data(), 4, threads4);
    double error = 0, slack = 0;
    for (size_t row = 0; row < rows; row += 7)
        for (size_t h = 0; h < 6; ++h) {
            const TestHead& head = heads[h / 3];
            const float* from = &q[row * width + h * 64];
            const auto p = probabilities(head, from, shape, 1300 - 211 + static_cast<int32_t>(row));
            const auto expected = weighted(head, p, 64);
            slack = std::max(slack, rounding(kernels, codec, codec, head, from, shape));
            for (size_t d = 0; d < 64; ++d)
                error = std::max(error, std::abs(out[row * width + h * 64 + d] - expected[d]));
        }
    expect(error < 1e-4 + slack, "%s codec %d window %d: 211 rows, error %g", kernels.isa, int(codec), window, error);
}

}  // namespace

int main() {
    check_half();
    check_errors();
    std::vector<std::string> isas = available_isas();
    if (std::count(isas.begin(), isas.end(), "avx512")) {
        const Kernels& kernels = crush::kernels(BF16_EMULATED);
        unsigned seed = 0;
        for (unsigned i = 0; i < 40; ++i)
            for (const int size : HEAD_SIZES)
                if (++seed % STEP == 0 && size % 32 == 0) check_prefill(kernels, size, seed);
    }
    for (const std::string& isa : isas) {
        const Kernels& kernels = crush::kernels(isa);
        check_softmax(kernels);
        for (const Codec codec : CODECS)
            if (STEP == 1 || codec == Codec::u8) check_many_rows(kernels, codec, codec == Codec::u8 ? 100 : 0);
        const Gaps gaps[] = {Gaps::none, Gaps::small, Gaps::large, Gaps::listed};
        unsigned seed = 0;
        for (const Codec key : CODECS)
            for (const Codec value : CODECS)
                for (const int size : HEAD_SIZES) {
                    if (++seed % STEP) continue;
                    std::vector<int> groups;
                    for (int g = 16; g <= size; g += 16)
                        if (size % g == 0) groups.push_back(g);
                    const int window = seed % 3 == 0 ? 40 : 0;
                    const Case c{
                        key,    value,         size, groups[seed % groups.size()], 1 + static_cast<int>(seed * 5 % 16),
                        window, gaps[seed % 4]};
                    check_attend(kernels, c, seed);
                    check_scores(kernels, c, seed);
                    for (unsigned i = 0; i < 2; ++i) check_codec(kernels, c, seed * 2 + i);
                    if (kernels.staged_scores && size >= MIN_STAGED_HEAD) check_staged_scores(kernels, size, seed);
                    if (kernels.prefill && size % 32 == 0) check_prefill(kernels, size, seed);
                }
        std::printf("%s: %u cases, %d failures so far\n", isa.c_str(), seed, failures);
    }
    return failures ? 1 : 0;
}
