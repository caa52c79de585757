// The Python face of csrc/: addresses, sizes and a CUDA stream as integers, and the checks that need no buffer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "build_config.h"
#include "base/build_info.h"
#include "coder/coder.h"
#include "base/cpu_features.h"
#include "gptq/gptq.h"
#include "gptq/gptq_refine.h"
#include "coder/int_layout.h"
#include "ngram/ngram_bindings.h"
#include "pack/pack_bits.h"
#include "trellis/trellis.h"

namespace py = pybind11;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

const uint8_t* source(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }
uint8_t* target(uintptr_t address) { return reinterpret_cast<uint8_t*>(address); }

void require(bool right, const char* name, int64_t value, const char* accepted) {
  if (!right) throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", accepted is " + accepted);
}

// The product of sizes, each 0 or more. More than any memory holds is refused, so that no kernel's numbers overflow.
int64_t product(std::initializer_list<int64_t> sizes) {
  constexpr int64_t most = int64_t{1} << 48;
  int64_t all = 1;
  for (const int64_t each : sizes) {
    const bool fits = each <= most && (each == 0 || all <= most / each);
    require(fits, "size", each, "what makes at most 2^48 with the others");
    all *= each;
  }
  return all;
}

void check(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits) {
  require(bits >= 1 && bits <= 8, "bits", bits, "1 to 8");
  require(count >= 0, "count", count, "0 or more");
  product({count});
  require(src != 0 || count == 0, "src", 0, "an address, or 0 with a count of 0");
  require(dst != 0 || count == 0, "dst", 0, "an address, or 0 with a count of 0");
}

int check_threads(int64_t threads) {
  require(threads >= 1, "threads", threads, "1 or more");
  return static_cast<int>(std::min<int64_t>(threads, 1024));
}

bool pack_bits(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits, bool is_signed, int64_t threads) {
  check(src, dst, count, bits);
  return pgolf::pack_bits(source(src), target(dst), count, static_cast<int>(bits), is_signed, check_threads(threads));
}

void unpack_bits(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits, bool is_signed, int64_t threads) {
  check(src, dst, count, bits);
  pgolf::unpack_bits(source(src), target(dst), count, static_cast<int>(bits), is_signed, check_threads(threads));
}

template <class Value>
Value* pointer(uintptr_t address) {
  return reinterpret_cast<Value*>(address);
}

void check_columns(int64_t n) { require(n >= 1 && n <= 1 << 24, "n", n, "1 to 16777216"); }

pgolf::Hessians hessians(uintptr_t data, int64_t count, int64_t n) {
  require(count >= 0, "count", count, "0 or more");
  check_columns(n);
  product({count, n, n});
  require(data != 0 || count == 0, "hessians", 0, "an address, or 0 with a count of 0");
  return {pointer<const float>(data), count, n};
}

void check_limit(int64_t limit) { require(limit >= 1 && limit <= 127, "limit", limit, "1 to 127"); }

// The columns of a matrix, as numbers of places in its rows.
void check_order(const int64_t* order, int64_t matrix, int64_t n) {
  for (int64_t i = matrix * n; i < (matrix + 1) * n; ++i)
    require(order[i] >= 0 && order[i] < n, "order", order[i], "0 to n - 1");
}

std::vector<int> check_hessians(uintptr_t data, int64_t count, int64_t n, float tolerance, int64_t threads) {
  const pgolf::Hessians bank = hessians(data, count, n);
  std::vector<uint8_t> flaws(count);
  pgolf::check_hessians(bank, tolerance, flaws.data(), check_threads(threads));
  return {flaws.begin(), flaws.end()};
}

std::vector<int64_t> factor_hessians(uintptr_t data, int64_t count, int64_t n, uintptr_t order, uintptr_t diagonal,
                                     const std::vector<int64_t>& which, uintptr_t factors, int64_t threads) {
  const pgolf::Hessians bank = hessians(data, count, n);
  for (int64_t each : which) require(each >= 0 && each < count, "which", each, "0 to count - 1");
  const bool there = order != 0 && diagonal != 0 && factors != 0;
  require(there || which.empty(), "order, diagonal or factors", 0, "an address");
  for (int64_t each : which) check_order(pointer<const int64_t>(order), each, n);
  std::vector<uint8_t> failed(which.size());
  pgolf::factor_hessians(bank, pointer<const int64_t>(order), pointer<const float>(diagonal), which.data(),
                         static_cast<int64_t>(which.size()), pointer<float>(factors), failed.data(),
                         check_threads(threads));
  std::vector<int64_t> bad;
  for (size_t i = 0; i < which.size(); ++i)
    if (failed[i]) bad.push_back(which[i]);
  return bad;
}

int64_t check_sizes(int64_t count, int64_t rows, int64_t n) {
  require(count >= 0, "count", count, "0 or more");
  require(rows >= 0, "rows", rows, "0 or more");
  check_columns(n);
  product({count, n, n});
  return product({count, rows, n});
}

void round_columns(uintptr_t weight, uintptr_t order, uintptr_t factors, uintptr_t scale, uintptr_t values,
                   int64_t count, int64_t rows, int64_t n, int64_t limit, int64_t threads) {
  const bool is_empty = check_sizes(count, rows, n) == 0;
  check_limit(limit);
  const bool there = weight != 0 && order != 0 && factors != 0 && scale != 0 && values != 0;
  require(there || is_empty, "weight, order, factors, scale or values", 0, "an address");
  for (int64_t i = 0; i < count && !is_empty; ++i) check_order(pointer<const int64_t>(order), i, n);
  pgolf::round_columns({pointer<const float>(weight), pointer<const int64_t>(order), pointer<const float>(factors),
                        pointer<const float>(scale), pointer<int8_t>(values), count, rows, n, static_cast<int>(limit)},
                       check_threads(threads));
}

void refine(uintptr_t weight, uintptr_t hessians, uintptr_t values, uintptr_t scale, int64_t count, int64_t rows,
            int64_t n, int64_t limit, int64_t sweeps, int64_t refits, int64_t threads) {
  const bool is_empty = check_sizes(count, rows, n) == 0;
  check_limit(limit);
  require(sweeps >= 0 && sweeps <= 1 << 20, "sweeps", sweeps, "0 to 1048576");
  require(refits >= 0 && refits <= 1 << 20, "refits", refits, "0 to 1048576");
  const bool there = weight != 0 && hessians != 0 && values != 0 && scale != 0;
  require(there || is_empty, "weight, hessians, values or scale", 0, "an address");
  pgolf::refine({pointer<const float>(weight), pointer<const float>(hessians), pointer<int8_t>(values),
                 pointer<float>(scale), count, rows, n, static_cast<int>(limit), static_cast<int>(sweeps),
                 static_cast<int>(refits)},
                check_threads(threads));
}

void require_address(uintptr_t address, const char* name, int64_t count) {
  require(address != 0 || count == 0, name, 0, "an address, or 0 where it holds nothing");
}

void check_matrix(int64_t rows, int64_t columns) {
  require(rows >= 0, "rows", rows, "0 or more");
  require(columns >= 0 && columns <= INT32_MAX, "columns", columns, "0 to 2147483647");
  product({rows, columns});
}

void check_states(int64_t states) { require(pgolf::is_trellis(states), "states", states, "4 or 8"); }

void trellis_search(uintptr_t target, uintptr_t factor, uintptr_t rate, uintptr_t weight, uintptr_t indices,
                    int64_t rows, int64_t columns, int64_t states, int64_t limit, int64_t threads) {
  check_matrix(rows, columns);
  check_limit(limit);
  check_states(states);
  require_address(target, "target", rows * columns);
  require_address(factor, "factor", columns);
  require_address(rate, "rate", 1);
  require_address(weight, "weight", rows);
  require_address(indices, "indices", rows * columns);
  const pgolf::TrellisSearch search = {pointer<const float>(target), pointer<const float>(factor), pointer<const float>(rate),
                                       pointer<const float>(weight), pointer<int8_t>(indices),     rows,
                                       columns,                 static_cast<int>(limit)};
  pgolf::trellis_search(search, static_cast<int>(states), check_threads(threads));
}

pgolf::TrellisBank check_bank(uintptr_t classes, int64_t matrices, int64_t rows, int64_t columns, int64_t states) {
  check_matrix(rows, columns);
  require(matrices >= 0, "matrices", matrices, "0 or more");
  product({matrices, rows, columns});
  check_states(states);
  require_address(classes, "classes", matrices * columns);
  return {matrices, rows, columns, pointer<const int8_t>(classes)};
}

void trellis_dequantize(uintptr_t indices, uintptr_t scale, uintptr_t classes, uintptr_t out, int64_t matrices,
                        int64_t rows, int64_t columns, int64_t states, int64_t threads) {
  const pgolf::TrellisBank bank = check_bank(classes, matrices, rows, columns, states);
  require_address(indices, "indices", matrices * rows * columns);
  require_address(scale, "scale", matrices * rows);
  require_address(out, "out", matrices * rows * columns);
  pgolf::trellis_dequantize(bank, pointer<const int8_t>(indices), pointer<const float>(scale), pointer<float>(out),
                            static_cast<int>(states), check_threads(threads));
}

#if PGOLF_CUDA
void throw_if_any(const std::string& problem) {
  if (!problem.empty()) throw std::runtime_error("CUDA: " + problem);
}

void pack_bits_cuda(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits, uintptr_t stream) {
  check(src, dst, count, bits);
  throw_if_any(pgolf::pack_bits_cuda(source(src), target(dst), count, static_cast<int>(bits),
                                     reinterpret_cast<void*>(stream)));
}

void unpack_bits_cuda(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits, bool is_signed, uintptr_t stream) {
  check(src, dst, count, bits);
  throw_if_any(pgolf::unpack_bits_cuda(source(src), target(dst), count, static_cast<int>(bits), is_signed,
                                       reinterpret_cast<void*>(stream)));
}

void round_block_cuda(uintptr_t weight, uintptr_t work, uintptr_t factor, uintptr_t scale, uintptr_t values,
                      uintptr_t difference, int64_t count, int64_t rows, int64_t n, int64_t start, int64_t width,
                      int64_t limit, uintptr_t stream) {
  const bool is_empty = check_sizes(count, rows, n) == 0;
  require(width >= 1 && width <= 128, "width", width, "1 to 128");
  require(start >= 0 && start <= n - width, "start", start, "0 to n - width");
  check_limit(limit);
  const bool there = weight && work && factor && scale && values && difference;
  require(there || is_empty, "one of the addresses", 0, "an address");
  throw_if_any(pgolf::round_block_cuda(
      {pointer<const float>(weight), pointer<const float>(work), pointer<const float>(factor),
       pointer<const float>(scale), pointer<int8_t>(values), pointer<float>(difference), count, rows, n, start,
       static_cast<int>(width), static_cast<int>(limit)},
      reinterpret_cast<void*>(stream)));
}
#endif

using Shape = std::vector<int64_t>;

void check_tensors(uintptr_t values, const pgolf::Blob& blob) {
  require(blob.is_list || blob.tensors.size() == 1, "tensors", blob.tensors.size(), "1 where there is no list");
  require(blob.tensors.size() <= pgolf::most_tensors, "tensors", blob.tensors.size(), "at most 4096");
  int64_t total = 0;
  for (const pgolf::CodedTensor& each : blob.tensors) {
    for (int64_t size : each.shape) require(size >= 0 && size <= pgolf::most_bytes, "size", size, "0 to 2^28");
    for (int64_t i = 0, product = 1; i < static_cast<int64_t>(each.shape.size()); ++i) {
      product *= std::max<int64_t>(each.shape[i], 1);
      require(product <= pgolf::most_bytes, "values", product, "at most 2^28");
    }
    total += each.values() * each.bytes;
    require(total <= pgolf::most_bytes, "bytes", total, "at most 2^28");
  }
  require(values != 0 || total == 0, "values", 0, "an address, or 0 without values");
}

// The encoders count the values from a tensor's least on; one without values has the bounds 0 and 0.
void check_bounds(const int8_t* values, const pgolf::Blob& blob) {
  for (const pgolf::CodedTensor& each : blob.tensors) {
    const int64_t count = each.values();
    int8_t least = count ? values[0] : 0, most = least;
    for (int64_t i = 0; i < count; ++i) least = std::min(least, values[i]), most = std::max(most, values[i]);
    require(each.low <= least && (count || each.low == 0), "low", each.low, "at most the least value, 0 without any");
    require(each.high >= most && (count || !each.high), "high", each.high, "at least the greatest value, 0 without any");
    values += count;
  }
}

py::bytes as_bytes(const std::vector<uint8_t>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

py::bytes encode_ints(uintptr_t values, const std::vector<std::tuple<Shape, int, int>>& tensors, bool is_list,
                      bool is_static, int trellis_states, int64_t threads) {
  pgolf::Blob blob;
  blob.kind = is_static ? pgolf::Kind::fixed : pgolf::Kind::mix;
  blob.is_list = is_list;
  blob.trellis_states = trellis_states;
  require(trellis_states == 0 || pgolf::is_trellis(trellis_states), "trellis_states", trellis_states, "0, 4 or 8");
  for (const auto& [shape, low, high] : tensors) {
    require(shape.size() <= 3, "dimensions", shape.size(), "at most 3");
    const bool is_short = trellis_states == 0 || shape.empty() || shape.back() <= pgolf::most_plane_columns;
    require(is_short, "columns", shape.empty() ? 1 : shape.back(), "at most 65536 with a trellis");
    require(low >= -128 && low <= high && high <= 127, "low", low, "-128 to high, which is at most 127");
    blob.tensors.push_back({shape, low, high, 1});
  }
  check_tensors(values, blob);
  std::vector<uint8_t> data;
  {
    py::gil_scoped_release unlocked;
    check_bounds(pointer<const int8_t>(values), blob);
    data = pgolf::encode_ints(blob, pointer<const int8_t>(values), check_threads(threads));
  }
  return as_bytes(data);
}

py::bytes encode_floats(uintptr_t values, const std::vector<std::tuple<Shape, int>>& tensors, bool is_list) {
  pgolf::Blob blob;
  blob.kind = pgolf::Kind::floats;
  blob.is_list = is_list;
  for (const auto& [shape, bytes] : tensors) {
    require(shape.size() <= 8, "dimensions", shape.size(), "at most 8");
    require(bytes == 2 || bytes == 4, "bytes", bytes, "2 or 4");
    blob.tensors.push_back({shape, 0, 0, bytes});
  }
  check_tensors(values, blob);
  std::vector<uint8_t> data;
  {
    py::gil_scoped_release unlocked;
    data = pgolf::encode_floats(blob, source(values));
  }
  return as_bytes(data);
}

pgolf::Blob open_blob(uintptr_t data, int64_t size) {
  pgolf::Blob blob;
  require(data != 0 && size >= 0, "size", size, "0 or more, and data an address");
  const char* problem = pgolf::read_blob(source(data), static_cast<size_t>(size), blob);
  if (problem) throw py::value_error(problem);
  return blob;
}

py::tuple read_blob(uintptr_t data, int64_t size) {
  const pgolf::Blob blob = open_blob(data, size);
  py::list tensors;
  for (const pgolf::CodedTensor& each : blob.tensors)
    tensors.append(py::make_tuple(py::tuple(py::cast(each.shape)), each.bytes));
  return py::make_tuple(static_cast<int>(blob.kind), blob.trellis_states, blob.is_list, tensors);
}

void decode_blob(uintptr_t data, int64_t size, uintptr_t values, int64_t bytes, int64_t threads) {
  const pgolf::Blob blob = open_blob(data, size);
  require(bytes == blob.bytes(), "bytes", bytes, "what the blob says");
  require(values != 0 || bytes == 0, "values", 0, "an address, or 0 without values");
  if (const char* problem = pgolf::decode_blob(blob, target(values), check_threads(threads)))
    throw py::value_error(problem);
}

py::dict build_info() {
  const pgolf::BuildInfo info = pgolf::build_info();
  py::dict result;
  result["version"] = info.version;
  result["compiler"] = info.compiler;
  result["build_type"] = info.build_type;
  result["sources"] = info.sources;
  result["cpu_features"] = pgolf::cpu_features();
  result["cpu_level"] = pgolf::level_name();
  result["cuda"] = info.cuda;
  result["cuda_version"] = info.cuda_version;
  result["cuda_archs"] = info.cuda_archs;
  result["cuda_reason"] = info.cuda_reason;
  result["cuda_devices"] = info.cuda_devices;
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using namespace py::literals;
  pgolf::set_level_of_environment();
  module.doc() = "C++ and CUDA operations on raw addresses; use pgolf.ops, which checks its tensors first.";

  module.def("pack_bits", &pack_bits, "src"_a, "dst"_a, "count"_a, "bits"_a, "signed"_a = true,
             "threads"_a = 1, Unlocked(),
             "Packs the low `bits` bits of `count` bytes at `src` into ceil(count * bits / 8) bytes at `dst`; False "
             "when a value does not fit.");
  module.def("unpack_bits", &unpack_bits, "src"_a, "dst"_a, "count"_a, "bits"_a, "signed"_a, "threads"_a = 1,
             Unlocked(), "The inverse of pack_bits: `count` bytes at `dst`, sign-extended when `signed`.");
  module.def("factor_size", [](int64_t n) { return check_columns(n), pgolf::factor_size(n); }, "n"_a, "Floats of a factor of n columns.");
  module.def("check_hessians", &check_hessians, "hessians"_a, "count"_a, "n"_a, "tolerance"_a,
             "threads"_a = 1, Unlocked(),
             "For each float32 matrix the sum of 1 (NaN or infinity), 2 (negative diagonal) and 4 (not symmetric).");
  module.def("factor_hessians", &factor_hessians, "hessians"_a, "count"_a, "n"_a, "order"_a,
             "diagonal"_a, "which"_a, "factors"_a, "threads"_a = 1, Unlocked(),
             "Factors the matrices `which` in strips; returns those that are not positive definite.");
  module.def("round_columns", &round_columns, "weight"_a, "order"_a, "factors"_a, "scale"_a, "values"_a, "count"_a,
             "rows"_a, "n"_a, "limit"_a, "threads"_a = 1, Unlocked(),
             "GPTQ's rounded values of a bank of float32 matrices, given the strips of factor_hessians.");
  module.def("refine", &refine, "weight"_a, "hessians"_a, "values"_a, "scale"_a, "count"_a, "rows"_a, "n"_a, "limit"_a,
             "sweeps"_a, "refits"_a, "threads"_a = 1, Unlocked(),
             "Coordinate descent on `values` and `scale` (float32), both in place.");
  module.def("trellis_search", &trellis_search, "target"_a, "factor"_a, "rate"_a, "weight"_a, "indices"_a, "rows"_a,
             "columns"_a, "states"_a, "limit"_a, "threads"_a = 1, Unlocked(),
             "Indices int8 [rows][columns] of the float32 target of that shape; see csrc/trellis/trellis.h.");
  module.def("trellis_dequantize", &trellis_dequantize, "indices"_a, "scale"_a, "classes"_a, "out"_a,
             "matrices"_a, "rows"_a, "columns"_a, "states"_a, "threads"_a = 1, Unlocked(),
             "The float32 weights [matrices][rows][columns] that indices of trellis_search mean; see csrc/trellis/trellis.h.");
#if PGOLF_CUDA
  module.def("pack_bits_cuda", &pack_bits_cuda, "src"_a, "dst"_a, "count"_a, "bits"_a, "stream"_a, Unlocked(),
             "pack_bits on device addresses of the current CUDA device, queued on `stream`.");
  module.def("unpack_bits_cuda", &unpack_bits_cuda, "src"_a, "dst"_a, "count"_a, "bits"_a, "signed"_a, "stream"_a,
             Unlocked(), "unpack_bits on device addresses of the current CUDA device, queued on `stream`.");
  module.def("round_block_cuda", &round_block_cuda, "weight"_a, "work"_a, "factor"_a, "scale"_a, "values"_a,
             "difference"_a, "count"_a, "rows"_a, "n"_a, "start"_a, "width"_a, "limit"_a, "stream"_a, Unlocked(),
             "GPTQ of the columns start..start+width-1, device addresses of the current device, queued on `stream`.");
#endif
  module.def("encode_ints", &encode_ints, "values"_a, "tensors"_a, "is_list"_a, "is_static"_a, "trellis_states"_a,
             "threads"_a, "A blob of int8 tensors, one after another at `values`; tensors: (shape, least, most).");
  module.def("encode_floats", &encode_floats, "values"_a, "tensors"_a, "is_list"_a,
             "A blob of float16 and float32 tensors, one after another at `values`; tensors: (shape, bytes a value).");
  module.def("read_blob", &read_blob, "data"_a, "size"_a,
             "(0 mix, 1 static, 2 floats; states; whether it is a list; [(shape, bytes a value)]) of a blob, or ValueError.");
  module.def("decode_blob", &decode_blob, "data"_a, "size"_a, "values"_a, "bytes"_a, "threads"_a, Unlocked(),
             "Decodes a blob to `bytes` bytes at `values`, or ValueError.");
  pgolf_bind_ngram(module);
  module.def("build_info", &build_info, "How the extension was built and what it found on this machine.");
  module.def("levels", &pgolf::levels, "The code paths that this CPU runs, slowest first.");
  module.def("level", &pgolf::level_name, "The code path in use.");
  module.def("set_level", &pgolf::set_level, "name"_a, "Forces one of levels(); ValueError for any other name.");
}
