// The Python module `_crush`: the store, and what tests and tools need of its kernels. The operations are in op/.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <openvino/core/version.hpp>
#include <string>

#include "kernels/kernels.hpp"
#include "python/py_kernels.hpp"
#include "python/py_product.hpp"
#include "python/py_sampling.hpp"
#include "python/py_store.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace crush {
namespace {

// The soname of libopenvino changes with every release, so a module of another one does not even load; this is for
// builds of the same name.
void check_openvino() {
    const std::string running = ov::get_openvino_version().buildNumber;
    const std::string built = std::to_string(OPENVINO_VERSION_MAJOR) + "." + std::to_string(OPENVINO_VERSION_MINOR) +
                              "." + std::to_string(OPENVINO_VERSION_PATCH);
    if (running.compare(0, built.size(), built) != 0) {
        throw nb::import_error(("built for openvino " + built + ", but this is " + running).c_str());
    }
}

nb::dict info() {
    nb::dict d;
    d["isa"] = kernels().isa;
    d["isas"] = available_isas();
    d["isa_cap"] = isa_cap();
    d["openvino"] = ov::get_openvino_version().buildNumber;
    return d;
}

}  // namespace
}  // namespace crush

NB_MODULE(_crush, m) {
    using namespace crush;
    nb::set_leak_warnings(false);  // a store that lives as long as the interpreter is no leak
    check_openvino();
    nb::exception<StoreFull>(m, "StoreFull", PyExc_MemoryError);

    m.def("info", &info);
    m.def("can_prefill",
          nb::overload_cast<const std::vector<LayerArgument>&, const std::string&, const std::string&>(&can_prefill),
          "layers"_a, "staging"_a, "isa"_a = "");
    m.def("tile_bytes", &tile_bytes, "key"_a, "value"_a, "head_size"_a, "group_size"_a, "listed"_a = false,
          "with_mean"_a = false);
    m.def("encode_decode", &encode_decode, "key"_a, "value"_a, "group_size"_a, "k"_a, "v"_a, "isa"_a = "");

    m.def("draw_rows", &draw_rows, "rows"_a, "params"_a, "isa"_a = "", "masks"_a = std::vector<Input>{});

    nb::class_<PyProduct>(m, "Product")
        .def(nb::init<const std::vector<PyProduct::Weights>&, const std::string&, const std::string&>(), "weights"_a,
             "activation"_a = "silu", "isa"_a = "")
        .def_prop_ro("id", &PyProduct::id)
        .def_prop_ro("nbytes", &PyProduct::nbytes)
        .def_prop_ro("num_inputs", &PyProduct::num_inputs)
        .def_prop_ro("num_outputs", &PyProduct::num_outputs)
        .def("run", &PyProduct::run, "x"_a);

    using S = PyStore;
    nb::class_<S>(m, "Store")
        .def(nb::init<const std::vector<LayerArgument>&, const std::string&, const std::string&, const std::string&,
                      int64_t, int64_t, int64_t, const std::string&, double>(),
             nb::kw_only(), "layers"_a, "key"_a, "value"_a, "recent"_a, "recent_tokens"_a, "group_size"_a,
             "max_bytes"_a = 0, "isa"_a = "", "recall_tokens"_a = 0)
        .def_prop_ro("id", &S::id)
        .def_prop_ro("isa", &S::isa)
        .def_prop_ro("nbytes", &S::nbytes)
        .def_prop_ro("reserved_bytes", &S::reserved_bytes)
        .def_prop_ro("max_bytes", &S::max_bytes)
        .def_prop_ro("num_sequences", &S::num_sequences)
        .def("close", &S::close)
        .def("create", &S::create, "capture_rows"_a = 0, "precisions"_a = nb::none())
        .def("set_precisions", &S::set_precisions, "seq"_a, "precisions"_a)
        .def("precisions", &S::precisions, "seq"_a)
        .def("release", &S::release, "seq"_a)
        .def("fork", &S::fork, "seq"_a, "num_tokens"_a = nb::none())
        .def("crop", &S::crop, "seq"_a, "num_tokens"_a)
        .def("reserve", &S::reserve, "seq"_a, "num_tokens"_a, "promised"_a = 0)
        .def("free_slots", &S::free_slots, "seq"_a)
        .def("quantize_aged", &S::quantize_aged, "seq"_a)
        .def("set_staging", &S::set_staging, "layer"_a, "keys"_a, "values"_a, "num_blocks"_a, "precision"_a)
        .def("attach_prefill", &S::attach_prefill, "seq"_a, "blocks"_a, "num_tokens"_a)
        .def("commit_prefill", &S::commit_prefill, "seq"_a, "offsets"_a = nb::none(), "indices"_a = nb::none(),
             "promised"_a = 0, "precisions"_a = nb::none(), "tiers"_a = nb::none())
        .def("compact", &S::compact, "seq"_a, "offsets"_a, "indices"_a, "precisions"_a = nb::none(),
             "tiers"_a = nb::none())
        .def("append", &S::append, "seq"_a, "layer"_a, "k"_a, "v"_a, "first_position"_a)
        .def("dump", &S::dump, "seq"_a)
        .def("load", &S::load, "heads"_a, "tiles"_a, "capture_rows"_a = 0, "promised"_a = 0)
        .def("attend", &S::attend, "layer"_a, "spans"_a, "q"_a)
        .def("prefill", &S::prefill, "layer"_a, "spans"_a, "q"_a, "k"_a, "v"_a)
        .def("recalled", &S::recalled, "layer"_a, "span"_a, "q"_a)
        .def("means", &S::means, "seq"_a, "layer"_a, "head"_a)
        .def("scores", &S::scores, "seq"_a, "layer"_a, "q"_a, "positions"_a, "reduce"_a)
        .def("set_capture", &S::set_capture, "seq"_a, "capture_rows"_a)
        .def("captured", &S::captured, "seq"_a, "layer"_a)
        .def("num_tokens", &S::num_tokens, "seq"_a, "layer"_a, "head"_a)
        .def("positions", &S::positions, "seq"_a, "layer"_a, "head"_a)
        .def("read", &S::read, "seq"_a, "layer"_a, "head"_a)
        .def("nbytes_of", &S::nbytes_of, "seq"_a)
        .def("capture_bytes", &S::capture_bytes, "rows"_a, "seq"_a = nb::none())
        .def("nbytes_of_all", &S::nbytes_of_all, "ids"_a)
        .def("nbytes_freed_by", &S::nbytes_freed_by, "ids"_a)
        .def("bytes_for", &S::bytes_for, "num_tokens"_a, "precisions"_a = nb::none());
}
