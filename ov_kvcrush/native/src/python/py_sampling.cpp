#include "python/py_sampling.hpp"

#include "kernels/sampling.hpp"
#include "op/threads.hpp"
#include "python/arguments.hpp"

namespace crush {

std::vector<DrawResult> draw_rows(const std::vector<Input>& rows, const std::vector<DrawArgument>& params,
                                  const std::string& isa, const std::vector<Input>& masks) {
    require(rows.size() == params.size(), "params must be as many as rows", params.size());
    require(masks.empty() || rows.size() == masks.size(), "masks must be as many as rows, or none", masks.size());
    const SamplingKernels& chosen = sampling_kernels(isa);
    std::vector<const float*> logits;
    std::vector<DrawParams> checked;
    for (size_t i = 0; i < rows.size(); ++i) {
        logits.push_back(data_of<float>(rows[i], "rows", {ANY}));
        const auto& [temperature, top_k, top_p, min_p, key, num_logprobs] = params[i];
        require(temperature >= 0, "temperature must be at least 0", temperature);
        checked.push_back(
            {temperature, to_size("top_k", top_k), top_p, min_p, key, to_int("num_logprobs", num_logprobs)});
    }
    std::vector<const int32_t*> bits(rows.size(), nullptr);
    for (size_t i = 0; i < masks.size(); ++i) {
        const int32_t* mask = data_of<int32_t>(masks[i], "masks", {ANY});
        const size_t num_words = masks[i].shape(0);
        if (num_words == 0) continue;
        require(num_words * 32 >= rows[i].shape(0), "masks must have a bit for each logit", num_words);
        bits[i] = mask;
    }
    std::vector<Drawn> drawn(rows.size());
    {
        const nanobind::gil_scoped_release release;
        parallel_for()(rows.size(), [&](size_t i) {
            const size_t n = rows[i].shape(0);
            std::vector<float> masked;
            if (bits[i] != nullptr) {
                masked.resize(n);
                mask_logits(logits[i], n, bits[i], masked.data());
            }
            drawn[i] = draw(bits[i] != nullptr ? masked.data() : logits[i], n, checked[i], chosen);
        });
    }
    std::vector<DrawResult> results;
    for (Drawn& d : drawn) results.emplace_back(d.token, d.logprob, std::move(d.top));
    return results;
}

}  // namespace crush
