#include "kernels/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "kernels/kernels.hpp"

namespace crush {

extern const SamplingKernels SAMPLING_SCALAR;
#if defined(CRUSH_X86)
extern const SamplingKernels SAMPLING_AVX2, SAMPLING_AVX512;
#endif

const SamplingKernels& sampling_kernels(const std::string& isa) {
    const std::string name = kernels(isa).isa;
#if defined(CRUSH_X86)
    if (name == "avx2") return SAMPLING_AVX2;
    if (name != "scalar") return SAMPLING_AVX512;
#endif
    return SAMPLING_SCALAR;
}

namespace {

constexpr float LOWEST = -__builtin_inff();
// A token of weight 1 arrives before -log(2^-54) = 37.5, one of weight e^-42 not before 2^-54 * e^42 = 96.
constexpr double HOPELESS = 42;
constexpr size_t NUM_BUCKETS = 4096;
constexpr double EXPECTED_ARRIVALS = 16;  // before the first bound; one is enough but for e^-16 of the draws

double arrival(uint64_t key, size_t token, double weight) {
    const auto bits = static_cast<double>(noise_bits(key, token) >> 11);
    return -std::log((bits + 0.5) * 0x1p-53) / weight;
}

struct Picked {
    int64_t token = -1;
    double mass = 0;  // weight of all tokens that might have been drawn
};

struct Candidate {
    double order;  // lower = first; ties go to the lower token
    size_t token;
    bool operator<(const Candidate& other) const {
        return order != other.order ? order < other.order : token < other.token;
    }
};

class Row {
public:
    Row(const float* logits, size_t n, const SamplingKernels& kernels)
        : x_(logits), n_(n), whole_(n / LOGIT_BLOCK), kernels_(kernels), block_max_(whole_ + 1, LOWEST) {
        std::fill(tail_, tail_ + LOGIT_BLOCK, LOWEST);
        std::copy(x_ + whole_ * LOGIT_BLOCK, x_ + n, tail_);
        max_ = kernels.maxima(x_, whole_, block_max_.data());
        max_ = std::max(max_, kernels.maxima(tail_, 1, &block_max_[whole_]));
    }

    float max() const { return max_; }
    float operator[](size_t token) const { return x_[token]; }

    double exp_sum(double temperature) const {
        const float scale = scale_of(temperature);
        return kernels_.exp_sum(x_, whole_, max_, scale) + kernels_.exp_sum(tail_, 1, max_, scale);
    }

    size_t first_of_largest() const {
        const auto block = std::find(block_max_.begin(), block_max_.end(), max_) - block_max_.begin();
        size_t token = static_cast<size_t>(block) * LOGIT_BLOCK;
        while (x_[token] != max_) ++token;
        return token;
    }

    // The k largest, in their order.
    std::vector<Candidate> largest(size_t k) const {
        float least = LOWEST;
        if (k <= whole_) {  // k maxima of blocks are not below it, so neither are the k largest
            std::vector<float> maxima = block_max_;
            std::nth_element(maxima.begin(), maxima.begin() + static_cast<ptrdiff_t>(k - 1), maxima.end(),
                             std::greater<float>());
            least = maxima[k - 1];
        }
        std::vector<Candidate> found;
        for_each_block(least, [&](size_t first, const float* x, size_t count) {
            for (size_t i = 0; i < count; ++i) {
                if (x[i] >= least) found.push_back({-static_cast<double>(x[i]), first + i});
            }
        });
        const size_t kept = std::min(k, found.size());
        std::nth_element(found.begin(), found.begin() + static_cast<ptrdiff_t>(kept), found.end());
        found.resize(kept);
        std::sort(found.begin(), found.end());
        return found;
    }

    Picked draw_of_few(std::vector<Candidate> few, const DrawParams& p) const {
        double total = 0;
        for (const Candidate& c : few) total += weight(c.token, p.temperature);
        double before = 0;
        Candidate first{HUGE_VAL, 0};
        for (const Candidate& c : few) {
            const double w = weight(c.token, p.temperature);
            if ((before > 0 && before >= p.top_p * total) || w < p.min_p) break;
            before += w;
            if (w > 0) first = std::min(first, Candidate{arrival(p.key, c.token, w), c.token});
        }
        return first.order < HUGE_VAL ? Picked{static_cast<int64_t>(first.token), before} : Picked{};
    }

    // A race: each token arrives after an exponential time with its probability as the rate; the first one that may be
    // drawn wins. So only the few that arrive early are asked whether they are in the nucleus, and nothing is sorted.
    Picked draw_of_all(const DrawParams& p) const {
        const double total = exp_sum(p.temperature);
        if (!(total > 0 && total < HUGE_VAL)) return {};
        const float least = lowest_possible(p, total);
        const int64_t token = winner(p, total, least);
        return {token, p.num_logprobs ? total : mass_possible(p, total, least)};
    }

    double weight(size_t token, double temperature) const {
        return std::exp(static_cast<double>(x_[token] - max_) / temperature);
    }

private:
    int64_t winner(const DrawParams& p, double total, float least) const {
        for (double bound = EXPECTED_ARRIVALS / (p.top_p * total); bound < 1e30; bound *= 8) {
            Candidate refused{HUGE_VAL, 0};  // by its logit: those behind it are out, too
            for (const Candidate& c : early(p, least, bound)) {
                const Candidate ranked{-static_cast<double>(x_[c.token]), c.token};
                if (refused < ranked) continue;
                if (p.top_p >= 1 || mass_before(c.token, p.temperature) < p.top_p * total) {
                    return static_cast<int64_t>(c.token);
                }
                refused = ranked;
            }
        }
        return static_cast<int64_t>(first_of_largest());
    }

    static float scale_of(double temperature) {
        return static_cast<float>(std::min(std::max(1 / temperature, 1e-30), 1e30));
    }

    template <class F>
    void for_each_block(float least, F f) const {
        for (size_t b = 0; b <= whole_; ++b) {
            if (block_max_[b] < least) continue;
            const size_t first = b * LOGIT_BLOCK;
            f(first, b < whole_ ? x_ + first : tail_, std::min(LOGIT_BLOCK, n_ - first));
        }
    }

    double mass_above(float least, double temperature) const {
        const float scale = scale_of(temperature);
        double mass = 0;
        for_each_block(least, [&](size_t, const float* x, size_t) {
            float e[LOGIT_BLOCK];
            kernels_.exp_block(x, max_, scale, e);
            mass += static_cast<double>(kernels_.mass_above(x, e, least));
        });
        return mass;
    }

    // Weight of the tokens that come before this one: larger logits, and equal ones of lower ids.
    double mass_before(size_t token, double temperature) const {
        const float own = x_[token];
        int equal = 0;
        for_each_block(own, [&](size_t first, const float* x, size_t) {
            if (first >= token) return;
            const size_t count = std::min(LOGIT_BLOCK, token - first);
            for (size_t i = 0; i < count; ++i) equal += x[i] == own;
        });
        return mass_above(own, temperature) + equal * weight(token, temperature);
    }

    // Below it no token can be drawn; it may lie lower than it needs to.
    float lowest_possible(const DrawParams& p, double total) const {
        double depth = HOPELESS;
        if (p.min_p > 0) depth = std::min(depth, -std::log(p.min_p) + 1e-3);
        if (p.top_p < 1) {
            for (const double d : {3., 7., 11.}) {
                if (d >= depth) break;
                const auto least = static_cast<float>(static_cast<double>(max_) - d * p.temperature);
                const auto left =
                    std::count_if(block_max_.begin(), block_max_.end(), [&](float m) { return m >= least; });
                if (static_cast<size_t>(left) * 2 > whole_) break;  // a flat row: knowing more would spare too little
                if (mass_above(least, p.temperature) > p.top_p * total * (1 + 1e-5)) return least;
            }
        }
        return static_cast<float>(static_cast<double>(max_) - depth * p.temperature);
    }

    // Weight of the tokens that may be drawn. least: lowest_possible.
    double mass_possible(const DrawParams& p, double total, float least) const {
        double mass = p.top_p < 1 ? nucleus_mass(p, total, least) : total;
        if (p.min_p > 0) {
            double likely = 0;
            for_each_block(least, [&](size_t first, const float* x, size_t count) {
                for (size_t i = 0; i < count; ++i) {
                    const double w = x[i] >= least ? weight(first + i, p.temperature) : 0;
                    if (w >= p.min_p) likely += w;
                }
            });
            mass = std::min(mass, likely);
        }
        return mass;
    }

    // Weight of the smallest set of most probable tokens that reaches top_p. Buckets by logit find where it ends, and
    // only one of them is looked into: 1 to 2 ms for a flat row of 152k, where halving the whole row took 7 to 15.
    double nucleus_mass(const DrawParams& p, double total, float least) const {
        std::vector<double> buckets(NUM_BUCKETS);
        const float scale = scale_of(p.temperature);
        for_each_block(least, [&](size_t, const float* x, size_t count) {
            float e[LOGIT_BLOCK];
            kernels_.exp_block(x, max_, scale, e);
            for (size_t i = 0; i < count; ++i) {
                if (x[i] >= least) buckets[bucket(x[i], scale)] += static_cast<double>(e[i]);
            }
        });
        const double wanted = p.top_p * total;
        double mass = 0;
        size_t last = 0;
        while (last < NUM_BUCKETS && mass + buckets[last] < wanted) mass += buckets[last++];
        if (last == NUM_BUCKETS) return mass;
        std::vector<double> weights;  // of the bucket in which it ends
        for_each_block(least, [&](size_t first, const float* x, size_t count) {
            for (size_t i = 0; i < count; ++i) {
                if (x[i] >= least && bucket(x[i], scale) == last) {
                    weights.push_back(weight(first + i, p.temperature));
                }
            }
        });
        auto begin = weights.begin(), end = weights.end();
        while (end - begin > 1) {
            const auto middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end, std::greater<double>());
            const double upper = std::accumulate(begin, middle, 0.);
            if (mass + upper >= wanted) {
                end = middle;
            } else {
                mass += upper;
                begin = middle;
            }
        }
        return mass + (begin < end ? *begin : 0);
    }

    size_t bucket(float x, float scale) const {
        constexpr auto per_unit = static_cast<float>(NUM_BUCKETS / HOPELESS);
        return static_cast<size_t>(std::min((max_ - x) * scale * per_unit, static_cast<float>(NUM_BUCKETS - 1)));
    }

    std::vector<Candidate> early(const DrawParams& p, float least, double bound) const {
        const float scale = scale_of(p.temperature);
        const auto loose = static_cast<float>(bound * (1 + 1e-4));  // for the rounding of weights
        std::vector<Candidate> found;
        for_each_block(least, [&](size_t first, const float* x, size_t count) {
            float e[LOGIT_BLOCK];
            kernels_.exp_block(x, max_, scale, e);
            if (!kernels_.any_early(e, p.key, first, loose)) return;
            for (size_t i = 0; i < count; ++i) {
                const double w = x[i] >= least ? weight(first + i, p.temperature) : 0;
                if (w <= 0 || w < p.min_p) continue;
                const double time = arrival(p.key, first + i, w);
                if (time < bound) found.push_back({time, first + i});
            }
        });
        std::sort(found.begin(), found.end());
        return found;
    }

    const float* x_;
    size_t n_, whole_;
    const SamplingKernels& kernels_;
    std::vector<float> block_max_;
    float tail_[LOGIT_BLOCK];
    float max_;
};

}  // namespace

void mask_logits(const float* logits, size_t n, const int32_t* mask, float* masked) {
    constexpr size_t WORD = 32;
    for (size_t first = 0; first < n; first += WORD) {
        const auto bits = static_cast<uint32_t>(mask[first / WORD]);
        const size_t count = std::min(WORD, n - first);
        if (bits == 0) {
            std::fill_n(masked + first, count, LOWEST);
        } else if (bits == ~0u) {
            std::copy_n(logits + first, count, masked + first);
        } else {
            for (size_t i = 0; i < count; ++i) masked[first + i] = (bits >> i) & 1u ? logits[first + i] : LOWEST;
        }
    }
}

Drawn draw(const float* logits, size_t n, const DrawParams& p, const SamplingKernels& kernels) {
    Drawn drawn;
    const Row row(logits, n, kernels);
    if (!std::isfinite(row.max())) return drawn;
    if (p.temperature == 0) {
        drawn.token = static_cast<int64_t>(row.first_of_largest());
    } else {
        const bool few = p.top_k > 0 && p.top_k < n;
        const Picked picked = few ? row.draw_of_few(row.largest(p.top_k), p) : row.draw_of_all(p);
        drawn.token = picked.token;
        if (picked.token >= 0) {
            const double weight = row.weight(static_cast<size_t>(picked.token), p.temperature);
            drawn.logprob = std::min(std::log(weight / picked.mass), 0.);
        }
    }
    if (drawn.token < 0 || p.num_logprobs == 0) return drawn;
    const double log_sum = std::log(row.exp_sum(1));
    const auto logprob = [&](size_t token) { return static_cast<double>(row[token] - row.max()) - log_sum; };
    drawn.logprob = logprob(static_cast<size_t>(drawn.token));
    if (p.num_logprobs > 1) {
        for (const Candidate& c : row.largest(std::min(n, static_cast<size_t>(p.num_logprobs)))) {
            drawn.top.emplace_back(static_cast<int64_t>(c.token), logprob(c.token));
        }
    }
    return drawn;
}

}  // namespace crush
