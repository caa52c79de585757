// Asymmetric numeral systems (range variant) with one table of frequencies a tensor, two with a trellis: eight states
// of 32 bits take turns, and give and take 16 bits at a time.
#include <algorithm>
#include <array>

#include "coder/int_coder.h"
#include "coder/mixer.h"
#include "trellis/parity_machine.h"
#include "coder/range_coder.h"

namespace pgolf {
namespace {

constexpr int frequency_bits = 14, lanes = 8, symbols = 256;
constexpr uint32_t whole = 1u << frequency_bits, lowest_state = 1u << 16;

struct Table {
  std::array<uint16_t, symbols> frequency = {}, start = {};  // of value low + i; they add up to `whole`
};

struct Lookup : Table {
  std::array<uint8_t, whole> symbol;  // of a number below `whole`
};

int symbols_of(const Plane& plane) { return plane.high - plane.low + 1; }

// Frequencies that add up to `whole`, at least 1 for what occurs.
void normalise(const std::array<int64_t, symbols>& counts, Table& table) {
  int64_t total = 0;
  for (int64_t count : counts) total += count;
  if (total == 0) {
    table.frequency[0] = whole;
    return;
  }
  int32_t left = whole;
  for (int i = 0; i < symbols; ++i) {
    const int64_t share = (counts[i] * whole + total / 2) / total;
    table.frequency[i] = static_cast<uint16_t>(counts[i] ? std::max<int64_t>(share, 1) : 0);
    left -= table.frequency[i];
  }
  while (left != 0) {  // a few units, where they weigh least
    uint16_t& most = *std::max_element(table.frequency.begin(), table.frequency.end());
    const int32_t change = left > 0 ? left : std::max<int32_t>(left, 1 - (most + 1) / 2);
    most = static_cast<uint16_t>(most + change);
    left -= change;
  }
}

// A table as bits: of each frequency its length in a tree that depends on the length before, then its bits.
template <class Coder>
class TableCoder {
 public:
  explicit TableCoder(Coder& coder) : coder_(coder) {}

  bool code(Table& table, int count) {
    uint32_t total = 0, before = 0;
    for (int i = 0; i < count; ++i) {
      uint32_t length = 0;
      while (table.frequency[i] >> length) ++length;
      length = code_tree(coder_, tables_, tree_[before], length, 4);
      uint32_t frequency = length > 0;
      for (uint32_t bit = length; bit-- > 1;)
        frequency = frequency * 2 + coder_.code(table.frequency[i] >> (bit - 1) & 1, 32768);
      table.frequency[i] = static_cast<uint16_t>(frequency);
      table.start[i] = static_cast<uint16_t>(total);
      total += frequency;
      before = length;
      if (total > whole) return false;
    }
    return total == whole;
  }

 private:
  Coder& coder_;
  const LogisticTables& tables_ = logistic_tables();
  Counter tree_[16][16];
};

bool has_table(const std::vector<Plane>& strip, size_t plane) {
  return plane == 0 || strip[plane].tensor != strip[plane - 1].tensor;
}

// Calls see(value, quantiser) for each value in turn.
template <class See>
void walk(const Plane& plane, ParityMachine machine, See see) {
  for (int64_t at = 0; at < plane.count; at += plane.cols) {
    machine.restart();
    for (int64_t i = at; i < std::min(at + plane.cols, plane.count); ++i) {
      see(plane.values[i], machine.quantiser());
      machine.advance(plane.values[i]);
    }
  }
}

struct Reader {
  const uint8_t* next;
  const uint8_t* end;
  bool failed = false;

  uint32_t word() {
    if (end - next < 2) {
      failed = true;
      return 0;
    }
    const uint32_t value = next[0] | next[1] << 8;
    next += 2;
    return value;
  }
};

uint8_t take(uint32_t& state, const Lookup& table) {
  const uint32_t at = state & (whole - 1);
  const uint8_t symbol = table.symbol[at];
  state = table.frequency[symbol] * (state >> frequency_bits) + at - table.start[symbol];
  return symbol;
}

// Reads without looking for the end, as long as one word a value is left.
void decode_plane(const Plane& plane, const Lookup& table, uint32_t* states, Reader& reader) {
  uint32_t x[lanes];
  std::copy(states, states + lanes, x);
  int64_t i = 0;
  const uint8_t* next = reader.next;
  for (; i + lanes <= plane.count && reader.end - next >= 2 * lanes; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      plane.values[i + lane] = static_cast<int8_t>(plane.low + take(x[lane], table));
      const uint32_t fuller = x[lane] << 16 | next[0] | static_cast<uint32_t>(next[1]) << 8;
      const bool low = x[lane] < lowest_state;
      x[lane] = low ? fuller : x[lane];
      next += low ? 2 : 0;
    }
  reader.next = next;
  for (int lane = 0; i < plane.count && !reader.failed; ++i, lane = (lane + 1) % lanes) {
    plane.values[i] = static_cast<int8_t>(plane.low + take(x[lane], table));
    if (x[lane] < lowest_state) x[lane] = x[lane] << 16 | reader.word();
  }
  std::copy(x, x + lanes, states);
}

void decode_plane(const Plane& plane, const Lookup* tables, ParityMachine machine, uint32_t* x, Reader& reader) {
  int lane = 0;
  for (int64_t at = 0; at < plane.count && !reader.failed; at += plane.cols) {
    machine.restart();
    const int64_t stop = std::min(at + plane.cols, plane.count);
    for (int64_t i = at; i < stop; ++i, lane = (lane + 1) % lanes) {
      const int value = plane.low + take(x[lane], tables[machine.quantiser()]);
      plane.values[i] = static_cast<int8_t>(value);
      machine.advance(value);
      if (x[lane] < lowest_state) x[lane] = x[lane] << 16 | reader.word();
    }
  }
}

void fill(Lookup& table, int count) {
  for (int i = 0; i < count; ++i)
    std::fill_n(table.symbol.begin() + table.start[i], table.frequency[i], static_cast<uint8_t>(i));
}

}  // namespace

// Payload: 3 bytes with the length of the coded tables, these, then the eight states and the words that refill them,
// all little-endian. The encoder goes backwards.
std::vector<uint8_t> encode_static(const std::vector<Plane>& strip, int trellis_states) {
  const ParityMachine machine(trellis_states);
  const int quantisers = trellis_states ? 2 : 1;
  std::vector<Table> tables;
  std::vector<size_t> table_of;
  std::vector<uint8_t> payload(3);
  RangeEncoder coder(payload);
  TableCoder<RangeEncoder> table_coder(coder);
  for (size_t p = 0; p < strip.size(); ++p) {
    if (has_table(strip, p)) {
      std::array<int64_t, symbols> counts[2] = {};
      for (size_t other = p; other < strip.size() && strip[other].tensor == strip[p].tensor; ++other)
        walk(strip[other], machine, [&](int value, int quantiser) { ++counts[quantiser][value - strip[p].low]; });
      for (int q = 0; q < quantisers; ++q) {
        tables.emplace_back();
        normalise(counts[q], tables.back());
        table_coder.code(tables.back(), symbols_of(strip[p]));
      }
    }
    table_of.push_back(tables.size() - quantisers);
  }
  coder.finish();
  const size_t length = payload.size() - 3;
  for (int i = 0; i < 3; ++i) payload[i] = static_cast<uint8_t>(length >> 8 * i);

  std::vector<uint16_t> words, coded;
  uint32_t states[lanes];
  std::fill_n(states, lanes, lowest_state);
  for (size_t p = strip.size(); p-- > 0;) {
    const Plane& plane = strip[p];
    coded.clear();
    walk(plane, machine, [&](int value, int quantiser) {
      coded.push_back(static_cast<uint16_t>((value - plane.low) | quantiser << 8));
    });
    for (int64_t i = plane.count; i-- > 0;) {
      uint32_t& x = states[i % lanes];
      const Table& table = tables[table_of[p] + (coded[i] >> 8)];
      const uint32_t frequency = table.frequency[coded[i] & 255], start = table.start[coded[i] & 255];
      if (x >> (32 - frequency_bits) >= frequency) {
        words.push_back(static_cast<uint16_t>(x));
        x >>= 16;
      }
      x = ((x / frequency) << frequency_bits) + x % frequency + start;
    }
  }
  for (uint32_t x : states)
    for (int i = 0; i < 4; ++i) payload.push_back(static_cast<uint8_t>(x >> 8 * i));
  for (size_t i = words.size(); i-- > 0;) {
    payload.push_back(static_cast<uint8_t>(words[i]));
    payload.push_back(static_cast<uint8_t>(words[i] >> 8));
  }
  return payload;
}

bool decode_static(const uint8_t* payload, size_t size, const std::vector<Plane>& strip, int trellis_states) {
  if (size < 3) return false;
  const size_t length = payload[0] | payload[1] << 8 | payload[2] << 16;
  if (size - 3 < length || size - 3 - length < 4 * lanes) return false;
  RangeDecoder coder(payload + 3, length);
  TableCoder<RangeDecoder> table_coder(coder);

  Reader reader{payload + 3 + length, payload + size};
  uint32_t states[lanes];
  for (uint32_t& x : states) {
    x = reader.word();
    x |= reader.word() << 16;
  }
  std::vector<Lookup> tables(trellis_states ? 2 : 1);
  for (size_t p = 0; p < strip.size(); ++p) {
    if (has_table(strip, p))
      for (Lookup& table : tables) {
        table.frequency = {};
        if (!table_coder.code(table, symbols_of(strip[p])) || coder.overdrawn()) return false;
        fill(table, symbols_of(strip[p]));
      }
    if (trellis_states)
      decode_plane(strip[p], tables.data(), ParityMachine(trellis_states), states, reader);
    else
      decode_plane(strip[p], tables[0], states, reader);
    if (reader.failed) return false;
  }
  const bool finished = std::all_of(states, states + lanes, [](uint32_t x) { return x == lowest_state; });
  return finished && coder.at_end() && std::all_of(reader.next, reader.end, [](uint8_t byte) { return byte == 0; });
}

}  // namespace pgolf
