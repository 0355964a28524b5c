#include "tools/presync/report.h"

#include <cstdio>
#include <fstream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "tools/presync/report_page.h"

namespace presync {
namespace {

struct ReportOptions {
  std::string name, out;
};

int Report(const ReportOptions& options, const CommandContext& context) {
  const Answer answer =
      Ask(context, {{"command", "report"}, {"name", options.name}}, absl::Seconds(10));
  if (answer.exit_code != kOk) return answer.exit_code;
  if (options.out.empty()) {  // with --json
    std::printf("%s\n", answer.json.dump().c_str());
    return kOk;
  }
  std::ofstream file(options.out, std::ios::trunc);
  file << RenderReportPage(answer.json, absl::Now());
  if (!file.flush()) {
    return Fail(absl::UnavailableError(absl::StrCat("can't write ", options.out)), context);
  }
  std::printf("%s\n", context.json ? answer.json.dump().c_str()
                                   : absl::StrCat("written to ", options.out).c_str());
  return kOk;
}

}  // namespace

RunCommand AddReport(CLI::App* app, CommandContext* context) {
  auto o = std::make_shared<ReportOptions>();
  app->add_option("name", o->name, "The guest's name")->required();
  app->add_option("--out", o->out, "The page, e.g. web1.html; needed unless --json is given");
  return [o, context] {
    if (o->out.empty() && !context->json) {
      return Fail(absl::InvalidArgumentError("report: --out FILE.html or --json is needed"),
                  *context, kUsage);
    }
    return Report(*o, *context);
  };
}

}  // namespace presync
