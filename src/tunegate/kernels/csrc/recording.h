// Kernel calls kept as they were made, addresses and all, to be made again without Python.
//
// Between begin and end every call that goes through issue() is done and kept. Running the recording repeats the calls
// on the same memory: what has changed there since is what they see.
#pragma once
#include <functional>
#include <utility>
#include <vector>

namespace tunegate {

using Recording = std::vector<std::function<void()>>;

Recording*& recording_now();  // of this thread; null: nothing is recorded

template <typename F>
void issue(F&& call) {
  if (recording_now()) recording_now()->emplace_back(call);
  call();
}

}  // namespace tunegate
