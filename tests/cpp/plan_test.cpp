// The plan over some thousand shapes: what it promises must hold for each.
#include <initializer_list>

#include "check.h"
#include "core/plan.h"

namespace fastrnn::test {

void test_plan() {
  for (const int64_t steps : {1, 2, 100}) {
    for (const int64_t batch : {0, 1, 3, 4, 5, 17, 129, 1024}) {
      for (const int64_t units : {1, 3, 17, 32, 64, 129, 512, 2048}) {
        for (const int threads : {1, 2, 3, 8, 61}) {
          for (const int directions : {1, 2}) {
            for (const bool projected : {false, true}) {
              for (const bool backward : {false, true}) {
                for (const bool ragged : {false, true}) {
                  const int64_t outputs = projected ? (units + 1) / 2 : units;
                  const CpuProblem problem{4,          0, steps,  batch,   {17, units, outputs, projected},
                                           directions, 4, ragged, backward};
                  const CpuPlan plan = plan_cpu(problem, {threads, 1 << 20});
                  CHECK(plan.threads >= 1 && plan.threads <= threads);
                  CHECK(!plan.shard_units || plan.threads / directions <= units);
                  // as they lie, weights are read once a row: only for a few rows
                  CHECK(plan.recurrent != Recurrent::kNatural || (batch <= 4 && !backward));
                  CHECK(plan.recurrent == Recurrent::kNatural || steps > 1 || batch > 4 || backward);
                  CHECK(plan.recurrent != Recurrent::kProduct || (steps == 1 && !projected && !backward));
                  CHECK(!plan.fused_input || plan.recurrent != Recurrent::kProduct);
                  CHECK(!(ragged && directions == 1 && plan.threads > 1) || plan.shard_units);
                }
              }
            }
          }
        }
      }
    }
  }
  // gate gradients of many rows are multiplied in windows of equal parts of the steps, a thousand rows or more in each
  const auto window = [](int64_t steps, int64_t batch, int64_t units, int directions = 1, int threads = 1) {
    const CpuProblem problem{4, 0,     steps, batch, {units, units, units, false}, directions, 4, false, true,
                             4, false, 0,     true};
    return plan_cpu(problem, {threads, 1 << 20}).window;
  };
  CHECK(window(16, 128, 64) == 8 && window(15, 128, 64) == 0 && window(100, 128, 64) == 9);
  CHECK(window(5, 1024, 64) == 1 && window(2, 4096, 64) == 1 && window(1, 4096, 64) == 0 && window(9, 0, 64) == 0);
  CHECK(window(31, 128, 1024) == 0 && window(32, 128, 1024) == 16 && window(2000, 1, 4) == 0);
  CHECK(window(100, 128, 64, 2) == 9 && window(100, 128, 64, 2, 2) == 0 && window(100, 128, 64, 1, 2) == 9);
  // work enough for two cores is shared between them, and a little is not
  const CpuProblem large{4, 0, 64, 64, {1024, 1024, 1024, false}, 1, 4, false, false};
  CHECK(plan_cpu(large, {2, 1 << 21}).threads == 2);
  CHECK(plan_cpu(large, {2, 1 << 21}).fused_input);
  // it takes some rows to have the input multiplied within the tiles, more where the weights fill L2, and beyond it more
  // again: by the part of the weights that is its own, and twice as many where gates keep their two sums apart
  const auto fused = [](int separate, int64_t batch, int64_t inputs, int64_t units) {
    const CpuProblem problem{4, separate, 64, batch, {inputs, units, units, false}, 1, 4, false, false};
    return plan_cpu(problem, {1, 1 << 20}).fused_input;
  };
  CHECK(!fused(0, 4, 128, 128) && fused(0, 5, 128, 128) && fused(1, 5, 128, 128));  // 512 KiB of weights
  CHECK(!fused(0, 11, 129, 128) && fused(0, 12, 129, 128) && fused(1, 12, 129, 128));
  CHECK(!fused(0, 15, 256, 256) && fused(0, 16, 256, 256) && !fused(1, 31, 256, 256) && fused(1, 32, 256, 256));
  CHECK(fused(0, 12, 100, 300) && !fused(0, 23, 900, 256));
  CHECK(fused(0, 2, 8, 512) && !fused(0, 2, 9, 512));
  // a few rows read the weights as they lie until packing would have paid, and those of 16 bits more of them: any number
  // where they come from beyond L2
  const auto natural = [](int64_t steps, int64_t batch, int64_t units, int weight_size, int threads = 1) {
    const CpuProblem problem{4, 0, steps, batch, {units, units, units, false}, 1, 4, false, false, weight_size};
    return plan_cpu(problem, {threads, 1 << 20}).recurrent == Recurrent::kNatural;
  };
  CHECK(natural(1, 4, 64, 4) && !natural(1, 5, 64, 4) && natural(3, 4, 64, 4) && !natural(4, 1, 64, 4));
  CHECK(natural(12, 1, 256, 4) && !natural(13, 1, 256, 4) && !natural(2, 5, 256, 4));
  CHECK(natural(64, 4, 1024, 4) && !natural(65, 1, 1024, 4));
  CHECK(natural(12, 1, 1024, 4, 2) && !natural(13, 1, 1024, 4, 2) && !natural(4, 1, 512, 4, 16));
  CHECK(natural(1, 16, 64, 2) && !natural(1, 17, 64, 2) && !natural(2, 5, 64, 2) && !natural(4, 1, 64, 2));
  CHECK(natural(1000, 4, 512, 2) && !natural(1000, 5, 512, 2));
  // and so is W_ih, unless one GEMM for all steps is worth it
  const auto dots = [](int64_t steps, int64_t units, int weight_size) {
    const CpuProblem problem{4, 0, steps, 1, {units, units, units, false}, 1, 4, false, false, weight_size};
    return plan_cpu(problem, {1, 1 << 20}).fused_input;
  };
  CHECK(dots(1, 1024, 4) && dots(3, 64, 4) && !dots(2, 1024, 4) && dots(6, 1024, 2) && !dots(7, 1024, 2));
  // float32 in parts of bfloat16, where a problem and the machine allow it: many rows and units, and in three parts no
  // tiles of rows half empty; the input along with them where the weights fit in half of L2
  const auto parts = [](int wanted, int64_t batch, int64_t units, int64_t steps, bool unit = true) {
    const CpuProblem problem{4, 0, steps, batch, {units, units, units, false}, 1, 4, false, false, 4, false, wanted};
    return plan_cpu(problem, {1, 1 << 21, false, unit});
  };
  CHECK(parts(2, 12, 64, 4).parts == 2 && parts(3, 13, 64, 4).parts == 3);
  CHECK(parts(2, 11, 64, 4).parts == 0 && parts(2, 12, 63, 4).parts == 0 && parts(2, 12, 64, 3).parts == 0);
  CHECK(parts(2, 17, 64, 4).parts == 2 && parts(3, 17, 64, 4).parts == 0 && parts(3, 26, 64, 4).parts == 3);
  CHECK(parts(0, 128, 64, 100).parts == 0 && parts(2, 128, 64, 100, false).parts == 0);
  CHECK(parts(2, 128, 181, 100).fused_input && !parts(2, 128, 182, 100).fused_input);  // 1 MiB in 4 bytes, or 6
  CHECK(parts(3, 128, 147, 100).fused_input && !parts(3, 128, 148, 100).fused_input);
  const CpuProblem rounded{4, 0, 4, 12, {64, 64, 64, false}, 1, 4, false, false, 2, true, 0};
  CHECK(plan_cpu(rounded, {1, 1 << 21, true, true}).parts == 1);
  // layers of a stack beside one another: where weights of a layer fit in L2, a step is worth two threads, and the last
  // layer begins soon enough; a few rows have their input multiplied some steps ahead
  const auto beside = [](int64_t steps, int64_t batch, int64_t inputs, int64_t units, int64_t layers, int threads,
                         int directions = 1) {
    const auto layer = [&](int64_t i) {
      return CpuProblem{4, 0, steps, batch, {i, units, units, false}, directions, 4, false, false};
    };
    return side_by_side(layer(inputs), layer(units), layers, {threads, 1 << 20});
  };
  CHECK(beside(128, 1, 64, 64, 2, 2) && beside(128, 1, 181, 181, 2, 2) && !beside(128, 1, 182, 182, 2, 2));
  CHECK(!beside(128, 1, 64, 64, 2, 1) && !beside(128, 1, 64, 64, 1, 2) && !beside(128, 1, 64, 64, 2, 2, 2));
  CHECK(!beside(15, 1, 17, 17, 2, 2) && !beside(128, 0, 64, 64, 2, 2) && !beside(128, 1, 1, 1, 2, 2));
  CHECK(beside(100, 1, 64, 64, 4, 2) && beside(100, 1, 64, 64, 5, 8) && !beside(20, 1, 128, 128, 2, 2));
  CHECK(!beside(128, 64, 64, 64, 2, 2));  // many rows are shared without barriers
  const auto beside_plan = [](int64_t batch, int weight_size = 4) {
    CpuProblem problem{4, 0, 64, batch, {64, 64, 64, false}, 1, 4, false, false, weight_size};
    problem.beside = true;
    return plan_cpu(problem, {1, 1 << 20});
  };
  CHECK(beside_plan(1).ahead == 12 && beside_plan(4).ahead == 3 && !beside_plan(4).fused_input);
  CHECK(beside_plan(5).ahead == 0 && beside_plan(5).fused_input);
  CHECK(beside_plan(5, 2).ahead == 3 && beside_plan(33, 2).ahead == 1 && !beside_plan(5, 2).fused_input);
  const CpuProblem tiny{1, 0, 2, 1, {4, 4, 4, false}, 1, 4, false, false};
  CHECK(plan_cpu(tiny, {2, 1 << 21}).threads == 1);
}

}  // namespace fastrnn::test
