// A stack of recurrent layers run step by step, with packed weights and its own state. No torch, no Python: to use it by
// itself, compile the files that CMakeLists.txt lists as `streaming`, and see tests/cpp/streaming_test.cpp.
//
//   StreamingSession<float> session(CellKind::kLstm, {layer0, layer1}, 1, WeightType::kFull);
//   session.step(input, output);  // on a real-time thread: no allocation, no lock, no exception, no system call
//
// A session is used by one thread at a time. What it is made from is not needed afterwards.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/streaming_kernels.h"

namespace fastrnn {

// Zeroed memory on a boundary of pages that are large where the system has such: a step reads all weights.
class AlignedMemory {
 public:
  explicit AlignedMemory(int64_t bytes);
  template <class U>
  U* as(int64_t offset_bytes = 0) const {
    return reinterpret_cast<U*>(memory_.get() + offset_bytes);
  }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* memory) const;
  };
  int64_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

template <class T>  // float or double
class StreamingSession {
 public:
  // N rows of a batch; states begin with zeros. Throws std::invalid_argument for layers that do not fit together, and for
  // double with other weights than kFull.
  StreamingSession(CellKind kind, const std::vector<StreamingWeights<T>>& layers, int64_t batch,
                   WeightType type = WeightType::kFull);

  // Takes other values for the weights; shapes as before, or std::invalid_argument.
  void refresh(const std::vector<StreamingWeights<T>>& layers);

  void step(const T* input, T* output) noexcept;  // [N, I] -> [N, P or H]
  // [T, N, I] -> [T, N, P or H], which may be the input itself, or else share no memory with it
  void chunk(const T* input, T* output, int64_t steps) noexcept;

  // The same of a layout of the caller's own: read(t, count) fills input() with the steps from t on and returns it, or
  // another place where they lie alike; write(t, count) takes outputs from output(), and is not called if they are to go
  // to `place`, laid out alike, which shares no memory with inputs. Neither may throw. Of as many steps as go together the
  // weights of the input are read once; no bit of the results depends on how many these are.
  template <class Read, class Write>
  void chunk(int64_t steps, const Read& read, const Write& write, T* place = nullptr) noexcept {
    Layer& last = layers_.back();
    T* const own[2] = {last.h[0], last.h[1]};
    for (int64_t t = 0, count = 0; t < steps; t += count) {
      count = std::min(window_, steps - t);
      const T* const from = read(t, count);
      advance(count, from, place == nullptr ? nullptr : place + t * batch_ * padded(outputs()));
      if (place == nullptr) write(t, count);
    }
    if (place != nullptr) {  // the last state is the last output
      std::copy_n(last.h[phase_], batch_ * padded(outputs()), own[phase_]);
      std::copy_n(own, 2, last.h);
      output_ = last.h[phase_];
    }
  }
  T* input() noexcept { return input_.template as<T>(); }  // [steps, N, padded(I)]
  // [steps, N, padded(P or H)], until the next call; where they went to the caller's memory, the last step's alone
  const T* output() const noexcept { return output_; }

  // The states of a layer, to read and to write: as far as its shape says; what is beyond must stay zero.
  T* h(int64_t layer) noexcept { return layers_[layer].h[phase_]; }  // [N, padded(P or H)]
  T* c(int64_t layer) noexcept { return layers_[layer].c; }  // [N, padded(H)], null for cells without
  void reset() noexcept;  // zeros everywhere
  void reset_row(int64_t n) noexcept;  // zeros in row n of the batch

  int64_t batch() const noexcept { return batch_; }
  int64_t depth() const noexcept { return static_cast<int64_t>(layers_.size()); }
  const LayerShape& shape(int64_t layer) const noexcept { return layers_[layer].shape; }
  int64_t inputs() const noexcept { return layers_.front().shape.inputs; }
  int64_t outputs() const noexcept { return layers_.back().shape.outputs; }
  int64_t packed_bytes() const noexcept { return weights_.bytes(); }

 private:
  struct Layer {
    LayerShape shape;
    void* packed;
    T* h[2];  // [N, padded(P or H)] read one, write the other; for a while the last layer's are outputs in their place
    T* c;  // [N, padded(H)] or null
    T* activation;  // [N, padded(H)] or null
    T* sequence;  // [window, N, padded(P or H)] of several steps
  };

  static constexpr int64_t kSize = sizeof(T);

  int64_t rows_ahead() const noexcept { return window_ > 1 ? window_ * batch_ : 0; }  // of steps that go together
  StreamingStep<T> first_layer(const T* from) noexcept;
  static void enter(const Layer& layer, StreamingStep<T>& step) noexcept;
  // at most a window; from [steps, N, padded(I)], to [steps, N, padded(P or H)] or null, of the last layer
  void advance(int64_t steps, const T* from, T* to) noexcept;
  void advance_one(const T* from, T* to) noexcept;
  void advance_several(int64_t steps, const T* from, T* to) noexcept;

  const StreamingKernels<T>& kernels_;
  int64_t batch_, window_;
  bool int8_dot_;
  int phase_ = 0;
  const T* output_ = nullptr;
  std::vector<Layer> layers_;
  AlignedMemory weights_, states_, input_, quantised_;
  AlignedMemory products_, sequences_;  // of a window; products of one layer at a time
};

extern template class StreamingSession<float>;
extern template class StreamingSession<double>;

}  // namespace fastrnn
