// Compiled for no instruction set and without fused products, so that it gives the same order everywhere; the same in
// numpy: tests/reference/clusters.py.
//
// Cost: for each level of log2(count / 32), a product with all keys, 2 * count * size operations, and at most 256 keys
// of each half in ROUNDS + 1 passes of 4 * size, which is twice as much again where halves are that small.
#include "store/clusters.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/tile.hpp"

namespace crush {
namespace {

constexpr size_t SAMPLE = 256;  // keys that a direction is found from
constexpr int ROUNDS = 4;       // of the power iteration
constexpr size_t LANES = 16;    // sums of products are kept apart, and added up in pairs

class Bisection {
public:
    Bisection(const float* keys, size_t count, size_t size)
        : keys_(keys),
          size_(size),
          order_(count),
          moved_(count),
          along_(count),
          sample_(SAMPLE * size),
          direction_(size),
          next_(size) {
        for (size_t i = 0; i < count; ++i) order_[i] = static_cast<int32_t>(i);
    }

    std::vector<int32_t> run() {
        split(0, order_.size());
        return std::move(order_);
    }

private:
    const float* key(int32_t token) const { return keys_ + static_cast<size_t>(token) * size_; }

    // order_[begin, end) ascends, and does in each tile afterwards.
    void split(size_t begin, size_t end) {
        const size_t count = end - begin, first = count / TILE / 2 * TILE;
        if (first == 0) return;
        find_direction(begin, count);
        for (size_t i = begin; i < end; ++i) {
            const int32_t token = order_[i];
            const float x = dot(key(token), direction_.data());
            along_[static_cast<size_t>(token)] = x == x ? x : 0.f;
        }
        const auto before = [this](int32_t a, int32_t b) {
            const float x = along_[static_cast<size_t>(a)], y = along_[static_cast<size_t>(b)];
            return x != y ? x < y : a < b;
        };
        const auto from = order_.begin() + static_cast<std::ptrdiff_t>(begin);
        const auto to = from + static_cast<std::ptrdiff_t>(count);
        std::copy(from, to, moved_.begin());
        const auto middle = moved_.begin() + static_cast<std::ptrdiff_t>(first);
        std::nth_element(moved_.begin(), middle, moved_.begin() + static_cast<std::ptrdiff_t>(count), before);
        const int32_t pivot = *middle;  // the first of the second half
        size_t low = 0, high = first;
        for (size_t i = begin; i < end; ++i) moved_[before(order_[i], pivot) ? low++ : high++] = order_[i];
        std::copy_n(moved_.begin(), count, from);
        split(begin, begin + first);
        split(begin + first, end);
    }

    // The principal direction of some of the keys of order_[begin, begin + count), spread over all of them.
    void find_direction(size_t begin, size_t count) {
        const size_t num = std::min(count, SAMPLE);
        std::fill(next_.begin(), next_.end(), 0.f);
        for (size_t i = 0; i < num; ++i) {
            const float* from = key(order_[begin + i * count / num]);
            float* to = sample_.data() + i * size_;
            for (size_t c = 0; c < size_; ++c) {
                to[c] = from[c];
                next_[c] += from[c];
            }
        }
        const float part = 1.f / static_cast<float>(num);
        size_t longest = 0;
        float most = -1.f;
        for (size_t i = 0; i < num; ++i) {
            float* x = sample_.data() + i * size_;
            for (size_t c = 0; c < size_; ++c) x[c] -= next_[c] * part;
            const float length = dot(x, x);
            if (length > most) {
                most = length;
                longest = i;
            }
        }
        std::copy_n(sample_.data() + longest * size_, size_, direction_.data());
        for (int round = 0; round < ROUNDS; ++round) {
            std::fill(next_.begin(), next_.end(), 0.f);
            for (size_t i = 0; i < num; ++i) {
                const float* x = sample_.data() + i * size_;
                const float weight = dot(x, direction_.data());
                for (size_t c = 0; c < size_; ++c) next_[c] += weight * x[c];
            }
            const float length = std::sqrt(dot(next_.data(), next_.data()));
            if (!(length > 0.f)) return;
            for (size_t c = 0; c < size_; ++c) direction_[c] = next_[c] / length;
        }
    }

    float dot(const float* a, const float* b) const {
        float lanes[LANES] = {};
        for (size_t c = 0; c < size_; c += LANES)
            for (size_t i = 0; i < LANES; ++i) lanes[i] += a[c + i] * b[c + i];
        for (size_t i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
        for (size_t i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
        return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    }

    const float* keys_;
    const size_t size_;
    std::vector<int32_t> order_, moved_;
    std::vector<float> along_;  // by token
    std::vector<float> sample_, direction_, next_;
};

}  // namespace

std::vector<int32_t> cluster(const float* keys, size_t count, size_t size) {
    return Bisection(keys, count, size).run();
}

}  // namespace crush
