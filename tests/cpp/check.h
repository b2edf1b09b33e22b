// The least that a test needs: counted checks that say where they failed.
#pragma once

#include <cmath>
#include <cstdio>

namespace fastrnn::test {

inline int failures = 0;
inline int checks = 0;

inline void check(bool ok, const char* what, const char* file, int line) {
  ++checks;
  if (ok) return;
  ++failures;
  if (failures <= 20) std::printf("%s:%d: failed: %s\n", file, line, what);
}

inline void check_close(double actual, double expected, double tolerance, const char* what, const char* file,
                        int line) {
  ++checks;
  if (std::abs(actual - expected) <= tolerance) return;  // false for NaN
  ++failures;
  if (failures <= 20) {
    std::printf("%s:%d: failed: %s is %.17g, expected %.17g +- %.3g\n", file, line, what, actual, expected, tolerance);
  }
}

// Uniform in [-1, 1), the same in every run.
class Random {
 public:
  explicit Random(unsigned seed) : state_(seed) {}
  double operator()() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(static_cast<long long>(state_) >> 11) / (1ll << 52);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>((operator()() + 1) / 2 * n) % n; }

 private:
  unsigned long long state_;
};

}  // namespace fastrnn::test

#define CHECK(condition) ::fastrnn::test::check(condition, #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(actual, expected, tolerance) \
  ::fastrnn::test::check_close(actual, expected, tolerance, #actual, __FILE__, __LINE__)
