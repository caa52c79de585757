// A hash table of small entries in buckets of one cache line. Keys are stored whole and compared, so two keys are never
// taken for one another. Entries neither move nor vanish: a pointer to one stays good, and a key that found no place
// never finds one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/byte_stream.h"
#include "base/zeroed_memory.h"

namespace pgolf {

// Murmur's finaliser on a key of 48 bits: every bit of the key reaches every bit of the hash.
inline uint64_t hash_key(uint32_t owner, uint16_t token) {
  uint64_t key = static_cast<uint64_t>(owner) << 16 | token;
  key = (key ^ key >> 31) * 0xff51afd7ed558ccdULL;
  key = (key ^ key >> 33) * 0xc4ceb9fe1a85ec53ULL;
  return key ^ key >> 33;
}

// `Entry` is a plain struct of a size that divides 64; `owner` is 0 where it is free. Its key is `owner` and `token`.
template <class Entry>
class BucketTable {
 public:
  static constexpr size_t width = 64 / sizeof(Entry);
  static constexpr size_t most_buckets = 16;  // looked through before a key is refused

  explicit BucketTable(size_t bytes)
      : buckets_(std::max<size_t>(bytes / 64, 2 * most_buckets) - most_buckets),
        entries_((buckets_ + most_buckets) * width) {}

  static size_t least_bytes() { return 64 * 2 * most_buckets; }

  // The entry of a key, or the free one that it would take, or null where the key is refused.
  Entry* place(uint32_t owner, uint16_t token) { return place_at(hash_key(owner, token), owner, token); }

  Entry* place_at(uint64_t hash, uint32_t owner, uint16_t token) {
    return search(hash, [=](const Entry& entry) { return entry.owner == owner && entry.token == token; });
  }

  // The same for any other kind of key: `same` tells whether a taken entry has it.
  template <class Same>
  Entry* search(uint64_t hash, Same same) {
    Entry* bucket = home(hash);
    const size_t start = hash % width;  // most keys are found at once, with no branch guessed wrong
    for (size_t i = 0; i < most_buckets; ++i, bucket += width) {
      for (size_t j = 0; j < width; ++j) {
        Entry& entry = bucket[(start + j) % width];
        if (entry.owner == 0 || same(entry)) return &entry;
      }
    }
    return nullptr;
  }

  const Entry* find(uint32_t owner, uint16_t token) const {
    const Entry* entry = const_cast<BucketTable*>(this)->place(owner, token);
    return entry && entry->owner ? entry : nullptr;
  }

  // The bucket where the search for a hash begins.
  Entry* home(uint64_t hash) {
    return entries_.data() + width * static_cast<size_t>(static_cast<unsigned __int128>(hash) * buckets_ >> 64);
  }

  size_t size() const { return entries_.size(); }
  Entry& operator[](size_t i) { return entries_[i]; }
  const Entry& operator[](size_t i) const { return entries_[i]; }
  uint32_t index(const Entry* entry) const { return static_cast<uint32_t>(entry - entries_.data()); }

  // The taken entries with their places.
  void save(ByteWriter& out) const {
    uint64_t taken = 0;
    for (size_t i = 0; i < size(); ++i) taken += entries_[i].owner != 0;
    out.put(taken);
    for (size_t i = 0; i < size(); ++i) {
      if (!entries_[i].owner) continue;
      out.put(static_cast<uint32_t>(i));
      out.put(entries_[i]);
    }
  }

  // Into an empty table. False where the bytes are no table; what the entries say is for the caller to judge.
  bool load(ByteReader& in) {
    uint64_t taken;
    in.get(taken);
    uint64_t next = 0;  // places ascend
    for (uint32_t place; taken && in.good(); --taken) {
      Entry entry;
      in.get(place);
      in.get(entry);
      if (!in.good() || place < next || place >= size() || !entry.owner) return false;
      entries_[place] = entry;
      next = uint64_t{place} + 1;
    }
    return in.good();
  }

  // Calls right(entry) for the taken entries until one is not; how many there are, or -1.
  template <class Right>
  int64_t count_right(Right right) {
    int64_t taken = 0;
    for (size_t i = 0; i < size(); ++i) {
      if (!entries_[i].owner) continue;
      if (!right(entries_[i])) return -1;
      ++taken;
    }
    return taken;
  }

  // Notes a taken entry for `forget`, which frees all that were noted.
  void note(const Entry* entry) { noted_.push_back(index(entry)); }

  void note_taken() {
    for (size_t i = 0; i < size(); ++i)
      if (entries_[i].owner) noted_.push_back(static_cast<uint32_t>(i));
  }

  void forget() {
    for (uint32_t i : noted_) entries_[i] = {};
    noted_.clear();
  }

 private:
  size_t buckets_;
  ZeroedArray<Entry> entries_;
  std::vector<uint32_t> noted_;
};

}  // namespace pgolf
