#include "op/plan.hpp"

#include <stdexcept>
#include <string>

namespace crush {
namespace {

constexpr size_t HEADER = 4, ENTRY = 6;

void require(bool holds, const char* rule, int64_t got) {
    if (!holds) throw std::invalid_argument(std::string("crush_plan ") + rule + ", got " + std::to_string(got));
}

}  // namespace

Plan Plan::parse(const int32_t* data, size_t size, size_t num_rows) {
    require(size >= HEADER, "must have at least 4 numbers", static_cast<int64_t>(size));
    require(data[0] == VERSION, "must be of version 1", data[0]);
    require(data[1] >= 0 && static_cast<size_t>(data[1]) == num_rows, "must be for as many rows as the step has",
            data[1]);
    require(data[2] >= 0 && data[2] <= data[1], "must have prompt rows within its rows", data[2]);
    require(data[3] >= 0 && size == HEADER + ENTRY * static_cast<size_t>(data[3]), "must have 6 numbers per entry",
            static_cast<int64_t>(size));
    Plan plan;
    plan.num_prompt_rows = static_cast<size_t>(data[2]);
    int64_t next_own = data[2], next_staged = 0;
    for (int32_t i = 0; i < data[3]; ++i) {
        const int32_t* e = data + HEADER + ENTRY * static_cast<size_t>(i);
        const PlanEntry entry{e[0], e[1], e[2], e[3], e[4], e[5]};
        require(entry.kind >= PlanEntry::stored && entry.kind <= PlanEntry::prefill, "must have entries of kind 0..2",
                entry.kind);
        require(entry.num_rows > 0, "must have at least one row per entry", entry.num_rows);
        require(entry.first_position >= 0 && entry.first_position <= INT32_MAX - entry.num_rows,
                "must have positions of at least 0", entry.first_position);
        require(entry.reduce >= 0 && entry.reduce <= 3, "must have reductions 0..3", entry.reduce);
        const bool own = entry.kind != PlanEntry::staged;
        int64_t& next = own ? next_own : next_staged;
        // Every row behind the prompt rows belongs to exactly one entry; prompt rows may have none.
        require(own ? entry.row_begin == next : entry.row_begin >= next, "must have rows in order", entry.row_begin);
        next = static_cast<int64_t>(entry.row_begin) + entry.num_rows;
        require(next <= (own ? data[1] : data[2]), "must have rows within the step", next);
        plan.entries.push_back(entry);
    }
    require(next_own == data[1], "must have an entry for every row behind the prompt rows", next_own);
    return plan;
}

}  // namespace crush
