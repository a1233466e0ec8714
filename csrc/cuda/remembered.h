// What is found once for a key and asked for at every launch. Several threads may ask.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>

namespace preact::cuda {

template <class Value, size_t kNumbers>
class Remembered {
 public:
  using Key = std::array<int64_t, kNumbers>;

  // The value of a key, by make() where it is new; if that throws, nothing is remembered.
  template <typename Make>
  Value get(const Key& key, const Make& make) {
    const std::lock_guard lock(mutex_);
    const auto found = values_.find(key);
    if (found != values_.end()) return found->second;
    if (values_.size() == kMost) values_.clear();  // images of ever other sizes
    return values_.emplace(key, make()).first->second;
  }

 private:
  static constexpr size_t kMost = 4096;
  std::mutex mutex_;
  std::map<Key, Value> values_;
};

}  // namespace preact::cuda
