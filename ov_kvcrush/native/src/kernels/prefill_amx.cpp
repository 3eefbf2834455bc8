// Attention of prompts with AMX. Cost for 128 tokens and 32 rows: D products of tile registers, of 16 cycles, which run
// beside the powers of the logits for the rows before and the rows after.
#include "kernels/amx_tiles.hpp"
#include "kernels/prefill_impl.hpp"

namespace crush {

void prefill_amx(const Prefill&);

namespace {

// Tile registers: sums of two by two tiles, and the factors.
enum { SUM_00, SUM_01, SUM_10, SUM_11, LEFT, LEFT_2, RIGHT, RIGHT_2 };

// Two steps for 16 pairs: the upper 16 rows, and the lower ones.
struct PanelsAmx {
    struct Setup {
        TileSetup tiles{whole_tiles()};
    };
    static constexpr bool OVERLAPS = true;

    static int steps(int parts) { return 2 * parts; }
    static void step(const Panel& p, int i) {
        const int part = i / 2;
        const uint8_t* left = p.left + 64 * part;
        if (i % 2 == 0) {
            const uint32_t* right = p.right + part * 16 * COLUMNS;
            if (part == 0) begin(p);
            tile_load<LEFT>(left, p.left_stride);
            tile_load<RIGHT>(right, 4 * COLUMNS);
            tile_load<RIGHT_2>(right + 16, 4 * COLUMNS);
            multiply_bf16<SUM_00, LEFT, RIGHT>();
            multiply_bf16<SUM_01, LEFT, RIGHT_2>();
        } else {
            tile_load<LEFT_2>(left + 16 * p.left_stride, p.left_stride);
            multiply_bf16<SUM_10, LEFT_2, RIGHT>();
            multiply_bf16<SUM_11, LEFT_2, RIGHT_2>();
            if (part + 1 == p.parts) store(p.sums);
        }
    }

private:
    static void begin(const Panel& p) {
        if (p.adds) {
            tile_load<SUM_00>(p.sums, 4 * COLUMNS);
            tile_load<SUM_01>(p.sums + 16, 4 * COLUMNS);
            tile_load<SUM_10>(p.sums + 16 * COLUMNS, 4 * COLUMNS);
            tile_load<SUM_11>(p.sums + 16 * COLUMNS + 16, 4 * COLUMNS);
        } else {
            tile_zero<SUM_00>();
            tile_zero<SUM_01>();
            tile_zero<SUM_10>();
            tile_zero<SUM_11>();
        }
    }
    static void store(float* to) {
        tile_store<SUM_00>(to, 4 * COLUMNS);
        tile_store<SUM_01>(to + 16, 4 * COLUMNS);
        tile_store<SUM_10>(to + 16 * COLUMNS, 4 * COLUMNS);
        tile_store<SUM_11>(to + 16 * COLUMNS + 16, 4 * COLUMNS);
    }
};

}  // namespace

void prefill_amx(const Prefill& args) { Prefiller<PanelsAmx>(args).run(); }

}  // namespace crush
