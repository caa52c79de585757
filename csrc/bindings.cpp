// The Python face of csrc/: addresses, sizes and a CUDA stream as integers, and the checks that need no buffer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "build_config.h"
#include "build_info.h"
#include "coder.h"
#include "cpu_features.h"
#include "pack_bits.h"

namespace py = pybind11;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

const uint8_t* source(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }
uint8_t* target(uintptr_t address) { return reinterpret_cast<uint8_t*>(address); }

void require(bool right, const char* name, int64_t value, const char* accepted) {
  if (!right) throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", accepted is " + accepted);
}

void check(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits) {
  require(bits >= 1 && bits <= 8, "bits", bits, "1 to 8");
  require(count >= 0, "count", count, "0 or more");
  require(src != 0 || count == 0, "src", 0, "an address, or 0 with a count of 0");
  require(dst != 0 || count == 0, "dst", 0, "an address, or 0 with a count of 0");
}

int check_threads(int64_t threads) {
  require(threads >= 1, "threads", threads, "1 or more");
  return static_cast<int>(std::min<int64_t>(threads, 1024));
}

void pack_bits(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits, int64_t threads) {
  check(src, dst, count, bits);
  pgolf::pack_bits(source(src), target(dst), count, static_cast<int>(bits), check_threads(threads));
}

void unpack_bits(uintptr_t src, uintptr_t dst, int64_t count, int64_t bits, bool is_signed, int64_t threads) {
  check(src, dst, count, bits);
  pgolf::unpack_bits(source(src), target(dst), count, static_cast<int>(bits), is_signed, check_threads(threads));
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
#endif

using Shape = std::vector<int64_t>;

void check_tensors(uintptr_t values, const pgolf::Blob& blob) {
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

py::bytes as_bytes(const std::vector<uint8_t>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

py::bytes encode_ints(uintptr_t values, const std::vector<std::tuple<Shape, int, int>>& tensors, bool is_list,
                      bool is_static, int trellis_states, int64_t threads) {
  pgolf::Blob blob;
  blob.kind = is_static ? pgolf::Kind::fixed : pgolf::Kind::mix;
  blob.is_list = is_list;
  blob.trellis_states = trellis_states;
  const bool known = trellis_states == 0 || trellis_states == 4 || trellis_states == 8;
  require(known, "trellis_states", trellis_states, "0, 4 or 8");
  for (const auto& [shape, low, high] : tensors) {
    require(shape.size() <= 3, "dimensions", shape.size(), "at most 3");
    require(low >= -128 && low <= high && high <= 127, "low", low, "-128 to high, which is at most 127");
    blob.tensors.push_back({shape, low, high, 1});
  }
  check_tensors(values, blob);
  std::vector<uint8_t> data;
  {
    py::gil_scoped_release unlocked;
    data = pgolf::encode_ints(blob, reinterpret_cast<const int8_t*>(values), check_threads(threads));
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
  return py::make_tuple(blob.kind == pgolf::Kind::floats, blob.is_list, tensors);
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
  module.doc() = "C++ and CUDA operations on raw addresses; use pgolf.ops, which checks its tensors first.";

  module.def("pack_bits", &pack_bits, "src"_a, "dst"_a, "count"_a, "bits"_a, "threads"_a = 1, Unlocked(),
             "Packs the low `bits` bits of `count` bytes at `src` into ceil(count * bits / 8) bytes at `dst`.");
  module.def("unpack_bits", &unpack_bits, "src"_a, "dst"_a, "count"_a, "bits"_a, "signed"_a, "threads"_a = 1,
             Unlocked(), "The inverse of pack_bits: `count` bytes at `dst`, sign-extended when `signed`.");
#if PGOLF_CUDA
  module.def("pack_bits_cuda", &pack_bits_cuda, "src"_a, "dst"_a, "count"_a, "bits"_a, "stream"_a, Unlocked(),
             "pack_bits on device addresses of the current CUDA device, queued on `stream`.");
  module.def("unpack_bits_cuda", &unpack_bits_cuda, "src"_a, "dst"_a, "count"_a, "bits"_a, "signed"_a, "stream"_a,
             Unlocked(), "unpack_bits on device addresses of the current CUDA device, queued on `stream`.");
#endif
  module.def("encode_ints", &encode_ints, "values"_a, "tensors"_a, "is_list"_a, "is_static"_a, "trellis_states"_a,
             "threads"_a, "A blob of int8 tensors, one after another at `values`; tensors: (shape, least, most).");
  module.def("encode_floats", &encode_floats, "values"_a, "tensors"_a, "is_list"_a,
             "A blob of float16 and float32 tensors, one after another at `values`; tensors: (shape, bytes a value).");
  module.def("read_blob", &read_blob, "data"_a, "size"_a,
             "(whether it holds floats, whether it is a list, [(shape, bytes a value)]) of a blob, or ValueError.");
  module.def("decode_blob", &decode_blob, "data"_a, "size"_a, "values"_a, "bytes"_a, "threads"_a, Unlocked(),
             "Decodes a blob to `bytes` bytes at `values`, or ValueError.");
  module.def("build_info", &build_info, "How the extension was built and what it found on this machine.");
  module.def("levels", &pgolf::levels, "The code paths that this CPU runs, slowest first.");
  module.def("level", &pgolf::level_name, "The code path in use.");
  module.def("set_level", &pgolf::set_level, "name"_a, "Forces one of levels(); ValueError for any other name.");
}
