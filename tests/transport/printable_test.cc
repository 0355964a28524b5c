#include "transport/printable.h"

#include <gtest/gtest.h>

namespace presync {
namespace {

TEST(PrintableText, LeavesWhatIsPrintable) {
  const std::string text = "guest \"web-1\": C:\\x, \xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80 100 %";
  EXPECT_EQ(PrintableText(text), text);
  EXPECT_EQ(PrintableText(""), "");
}

TEST(PrintableText, EscapesWhatATerminalWouldObey) {
  EXPECT_EQ(PrintableText("a\nb\r\tc"), "a\\nb\\r\\tc");
  EXPECT_EQ(PrintableText("\x1b[2J\x07\x7f"), "\\x1b[2J\\x07\\x7f");
  EXPECT_EQ(PrintableText(std::string("a\0b", 3)), "a\\x00b");
  EXPECT_EQ(PrintableText("\xc2\x9b"
                          "31m"),
            "\\u009b31m")
      << "C1: the same as ESC [";
  EXPECT_EQ(PrintableText("\xe2\x80\xae"
                          "gpj.exe\xe2\x81\xa6"),
            "\\u202egpj.exe\\u2066");
  EXPECT_EQ(PrintableText("a\xe2\x80\xa8"
                          "b"),
            "a\\u2028b");
}

TEST(PrintableText, EscapesWhatIsNoUtf8) {
  EXPECT_EQ(PrintableText("\x9b"
                          "31m"),
            "\\x9b31m")
      << "C1 of an 8-bit terminal";
  EXPECT_EQ(PrintableText("\xc0\x8a"), "\\xc0\\x8a") << "overlong";
  EXPECT_EQ(PrintableText("\xe0\x80\x8a"), "\\xe0\\x80\\x8a");
  EXPECT_EQ(PrintableText("\xed\xa0\x80"), "\\xed\\xa0\\x80") << "a surrogate";
  EXPECT_EQ(PrintableText("\xf5\x80\x80\x80"), "\\xf5\\x80\\x80\\x80");
  EXPECT_EQ(PrintableText("a\xe2\x82"), "a\\xe2\\x82") << "cut";
}

TEST(PrintableText, IsBoundedAndStable) {
  const std::string cut = PrintableText(std::string(1 << 20, '\n'));
  EXPECT_EQ(cut.size(), kMostPrintableBytes + 3);
  EXPECT_EQ(cut.substr(cut.size() - 5), "\\n...");
  const std::string once = PrintableText("\x1b]0;title\x07\xe2\x80\xae");
  EXPECT_EQ(PrintableText(once), once);
}

}  // namespace
}  // namespace presync
