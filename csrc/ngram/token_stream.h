// The tokens of a stream that arrives in pieces: those on record, the last few, and where a document began.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/byte_stream.h"
#include "base/zeroed_memory.h"

namespace pgolf {

class TokenStream {
 public:
  TokenStream(int longest, int boundary, bool reset, size_t kept)
      : longest_(longest), boundary_(boundary), reset_(reset), history_(kept), recent_(longest) {}

  // Cuts `tokens` to blocks: block(first, x, count), where x[-longest] to x[count - 1] can be read, is to count `count`
  // tokens and call `next` after each. forget() is called after a boundary where those reset.
  template <class Block, class Forget>
  void feed(const uint16_t* tokens, int64_t count, Block block, Forget forget) {
    for (int64_t begin = 0; begin < count;) {
      int64_t end = std::min(count, begin + block_tokens);
      const uint16_t* last = reset_ ? std::find(tokens + begin, tokens + end, boundary_) : tokens + end;
      const bool resets = last != tokens + end;
      if (resets) end = last - tokens + 1;
      append(tokens + begin, end - begin);
      block(begin, recent_.data() + longest_, end - begin);
      recent_.erase(recent_.begin(), recent_.end() - longest_);
      if (resets) {
        forget();
        position_ = 0;
        reach_ = 1;  // what follows has the boundary for its context
        history_[0] = tokens[end - 1];
        position_ = 1;
      }
      begin = end;
    }
  }

  void next(uint16_t token) {
    reach_ = longer(reach_, token);
    ++position_;
  }

  // Tokens of the longest possible context after `token`, where it was `reach` before: back to a boundary, no further.
  int longer(int reach, uint16_t token) const { return token == boundary_ ? 1 : std::min(reach + 1, longest_); }

  int longest() const { return longest_; }
  bool resets() const { return reset_; }
  bool is_boundary(uint16_t token) const { return token == boundary_; }
  int reach() const { return reach_; }
  uint64_t position() const { return position_; }  // of the next token
  bool on_record() const { return position_ < history_.size(); }
  size_t kept() const { return std::min<uint64_t>(position_, history_.size()); }
  const uint16_t* history() const { return history_.data(); }
  const uint16_t* recent_end() const { return recent_.data() + recent_.size(); }

  // Whether so many tokens can have been read; no stream is long enough to count further.
  bool can_have_read(uint64_t tokens) const { return tokens >= position_ && tokens <= uint64_t{1} << 62; }

  void save(ByteWriter& out) const {
    out.put(position_);
    out.put(reach_);
    out.put(recent_.data(), recent_.size());
    out.put(history_.data(), kept());
  }

  bool load(ByteReader& in, int vocab_size) {
    in.get(position_);
    in.get(reach_);
    in.get(recent_.data(), recent_.size());
    in.get(history_.data(), kept());
    const auto known = [=](uint16_t token) { return token < vocab_size; };
    return in.good() && can_have_read(position_) && std::all_of(recent_.begin(), recent_.end(), known) &&
           std::all_of(history_.data(), history_.data() + kept(), known) && agrees();
  }

 private:
  static constexpr int64_t block_tokens = 1 << 14;

  // Whether the last tokens are those on record, and as many as the next token's contexts can have.
  bool agrees() const {
    const uint64_t known = std::min<uint64_t>(position_, longest_);
    int reach = static_cast<int>(known);
    for (uint64_t back = known; back > 0; --back) {
      const uint16_t token = recent_[longest_ - back];
      if (position_ - back < history_.size() && history_[position_ - back] != token) return false;
      if (token == boundary_) reach = static_cast<int>(back);
    }
    return reach_ == reach;
  }

  void append(const uint16_t* tokens, int64_t count) {
    recent_.insert(recent_.end(), tokens, tokens + count);
    if (!on_record()) return;
    const uint64_t room = history_.size() - position_;
    std::memcpy(history_.data() + position_, tokens, sizeof(uint16_t) * std::min<uint64_t>(room, count));
  }

  int longest_, boundary_;
  bool reset_;
  ZeroedArray<uint16_t> history_;  // the first tokens since the start or the last reset
  std::vector<uint16_t> recent_;   // the last `longest` tokens; while a block is at work, its tokens after them
  uint64_t position_ = 0;          // since the start or the last reset
  int reach_ = 0;                  // of the next token
};

}  // namespace pgolf
