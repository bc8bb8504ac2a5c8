"""What the grader of mathematics must say: (gold, completion, whether it is right), by what is tried. All rows are made for this table."""

from __future__ import annotations

Row = tuple[str, str, bool]


def box(answer: str) -> str:
    r"""A completion that ends with the answer in a box."""
    return rf"Adding both sides gives the result, so it is $\boxed{{{answer}}}$."


def boxed(*rows: tuple[str, str, bool]) -> list[Row]:
    """Rows whose second text is the answer alone."""
    return [(gold, box(answer), right) for gold, answer, right in rows]


TABLE: dict[str, list[Row]] = {
    "numbers": boxed(
        ("7", "7", True), ("7", "8", False), ("7", "-7", False), ("-7", "-7", True), ("-7", "−7", True),
        ("7", "7.0", True), ("7", "7.01", False), ("7", "07", True), ("073", "73", True), ("73", "073", True),
        ("1234", "1,234", True), ("1,234", "1234", True), ("1,234", "1{,}234", True), ("1234567", "1,234,567", True),
        ("12345", r"12\,345", True), ("12345", "1234", False), ("0.5", ".5", True), ("0.50", "0.5", True), ("100", "1e2", True),
        ("0.5", "0.05", False), ("7", "77", False), ("7", "+7", True), ("3000", r"3 \times 10^3", True), ("0.002", r"2 \cdot 10^{-3}", True),
        ("3.0e5", r"3 \times 10^{5}", True), ("3000", r"3 \times 10^4", False), ("2^{10}", "1024", True), ("1024", "2^{10}", True),
        ("1024", "2^{9}", False), ("6", "3!", True), ("120", "5!", True), ("7", r"\sqrt{49}", True), ("0", "-0", True),
        (r"11,\! 111,\! 111,\! 100", "11111111100", True), (r"11,\! 111,\! 111,\! 100", "11111111103", False), ("1000000", "1000001", False), ("1e9", "1000000001", False),
        ("1234567", "1234567.9", False), ("2500000", "2499999.5", False), ("123456789", "123456788.9", False), ("-2500000", "-2500000.5", False),
        ("2500000", "2500000.0", True), ("3", "2.9999999999", True), ("2500000.25", "2500000.2500001", True), ("1234567", "1.2345675e6", False),
    ),
    "fractions": boxed(
        (r"\frac{1}{2}", "1/2", True), (r"\frac{1}{2}", "0.5", True), (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac{1}{2}", r"\tfrac12", True), (r"\frac12", r"\frac{1}{2}", True), (r"\frac{1}{2}", r"\frac{2}{4}", True),
        (r"\frac{1}{2}", r"\frac{2}{1}", False), (r"-\frac{1}{2}", r"\frac{-1}{2}", True), (r"-\frac{1}{2}", r"\frac{1}{-2}", True),
        (r"-\frac{1}{2}", r"\frac{1}{2}", False), (r"\frac{7}{3}", r"2\frac{1}{3}", True), (r"2\frac{1}{3}", "7/3", True),
        (r"\frac{7}{3}", "2 1/3", True), (r"\frac{1}{3}", "0.333", False), (r"\frac{1}{3}", "0.33333333", True),
        (r"\frac{\pi}{4}", r"\pi/4", True), (r"\frac{\pi}{4}", r"\frac{1}{4}\pi", True), (r"\frac{\pi}{4}", r"\frac{\pi}{3}", False),
        (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}{2}", True), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
        (r"\frac{x}{2}", r"\frac{1}{2}x", True), (r"\frac{x}{2}", "x/2", True), (r"\frac{x}{2}", "x/3", False),
        (r"\frac{3}{56}", "3/56", True), (r"\frac{14}{3}", r"4\frac{2}{3}", True), (r"\frac{14}{3}", "14/3", True),
    ),
    "expressions": boxed(
        ("x+1", "1+x", True), ("x+1", "x-1", False), ("2x", r"2 \cdot x", True), ("x^2-1", "(x-1)(x+1)", True),
        ("x^2-1", "(x-1)^2", False), ("p - q", "-q+p", True), ("p - q", "q-p", False), (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\sqrt{8}", r"\sqrt{2}", False), (r"3\sqrt{13}", r"3 \sqrt {13}", True), (r"11\sqrt2", r"11\sqrt{2}", True),
        ("6 - 5i", "6-5i", True), ("6 - 5i", "-5i + 6", True), ("6 - 5i", "6+5i", False), ("2+3i", "3i+2", True),
        (r"\sin x", r"\sin(x)", True), (r"\ln 2", r"\log 2", False), (r"\ln 4", r"2\ln 2", True), (r"e^{2}", "e^2", True), ("x^{10}", "x^10", True), ("a_1+a_2", "a_2+a_1", True),
        (r"\cot x", r"\frac{1}{\tan x}", True), (r"2\pi", "6.28", False), (r"2\pi", r"\pi \cdot 2", True), (r"2\pi", "2π", True),
        (r"\infty", "∞", True), (r"-\infty", r"\infty", False), (r"\binom{5}{2}", "10", True), ("|x|", r"\left|x\right|", True),
        (r"(x+2)(x-3)", "x^2-x-6", True), ("10x^3", "10x^2", False),
    ),
    "equations": boxed(
        ("5", "x = 5", True), ("x=5", "5", True), ("5", "x = 6", False), ("5", "x=5.", True), ("y = 2x + 3", "y=3+2x", True),
        ("y = 2x + 3", "2x+3", True), ("y = 2x + 3", "y = 2x - 3", False), ("2x - y + 3 = 0", "y = 2x+3", True), ("x+1", "f(x) = x+1", True),
        ("-50", "y=-50", True), ("x = 1", "y = 1", True), ("4", "a_4=4", True),
        ("y = 2x + 3", "2x - y + 3 = 0", True), ("y = 2x + 3", "2x - y - 3 = 0", False), ("y = 2x", "x = y/2", True), ("y = 2x", "x = 2y", False),
        ("x=5", "2x=10", False), ("2x = 10", "x = 5", True), ("x=5", "x = 2+3 = 5", True), (r"x^2+y^2=4", r"\frac{x^2}{4}+\frac{y^2}{4}=1", True),
        ("(x-2)^2+y^2=4", "x^2-4x+y^2=0", True), ("(x-2)^2+y^2=4", "(x+2)^2+y^2=4", False), ("xy=1", r"y=\frac{1}{x}", True),
    ),
    "intervals": boxed(
        ("[0,1]", "[0, 1]", True), ("[0,1]", "(0,1)", False), ("[0,1)", "[0,1]", False), ("(0,1]", "(0, 1]", True),
        (r"[-2,7]", r"x \in [-2,7]", True), (r"x \in [-2,7]", "[-2,7]", True), (r"(-\infty, 3)", r"\left(-\infty,3\right)", True),
        (r"(-\infty, 3)", "(-∞, 3)", True), (r"(-\infty, 3)", r"(-\infty, 3]", False), (r"(2,12) \cup (12,102)", r"(2,12)\cup(12,102)", True),
        (r"(2,12) \cup (12,102)", r"(2,12)\cup(12,101)", False), (r"[\frac{1}{2}, 1]", "[0.5, 1]", True), ("(3,4]", r"\left( 3, 4 \right]", True),
        (r"\left[ \frac{\pi}{8}, \frac{5 \pi}{4} \right]", r"[\pi/8, 5\pi/4]", True), ("(1,2)", "(1,3)", False),
        ("[1,3]", r"1 \le x \le 3", True), ("(1,3)", "1 < x < 3", True), ("(1,3)", r"1 \le x \le 3", False),
        ("(0,180)", "[0,180]", False), ("[100, 200]", "(100, 200)", False), ("[10,100]", r"10 \le x \le 100", True),
    ),
    "tuples": boxed(
        ("(1,2)", "(1, 2)", True), ("(1,2)", "(2,1)", False), ("(1,2)", "(1,2,3)", False), ("(1,-2,3)", r"\left( 1, -2, 3 \right)", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True), (r"\left( 3, \frac{\pi}{2} \right)", "(3, 90)", False),
        (r"\left( \frac{3}{5}, \frac{8}{3} \right)", "(3/5, 8/3)", True), ("(6,31,-1)", "(6, 31, -1)", True), ("(6,31,-1)", "6,31,-1", True),
        ("(1,2),(3,4)", "(3,4),(1,2)", True), ("(1,2),(3,4)", "(1,2),(4,3)", False), ("(0.5,2)", "(1/2, 2)", True),
        ("(3,120)", "(120,3)", False), ("(3,120)", "[3,120]", False), ("(1,234, 5)", "(1234, 5)", True), ("(1,000)", "1000", True),
    ),
    "sets": boxed(
        (r"\{1,2,3\}", r"\{3, 2, 1\}", True), (r"\{1,2,3\}", r"\{1,2\}", False), ("1,2", "2,1", True), ("1,2", "1,3", False),
        ("1,2", "1", False), ("1", "1,2", False), ("1,-2", "-2, 1", True), (r"\{1,2\}", "1, 2", True), ("3, 5, 7", r"\{3,5,7\}", True),
        (r"1,\frac{1}{2}", "0.5, 1", True), ("1,2", r"1 \text{ and } 2", True), ("1,2", r"x = 1 \text{ or } x = 2", True), ("1,2", "x=1, x=2", True),
        (r"\pm 2", r"2, -2", True), (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2", True), (r"1 \pm \sqrt{2}", r"1 \pm \sqrt2", True),
        (r"1 \pm \sqrt{2}", r"1 \pm \sqrt3", False), ("1,2,2", "1,2", False), ("1,2,3,4", "4,3,2,1", True), (r"\emptyset", r"\varnothing", True),
        (r"\{a,b\}", r"\{b,a\}", True), ("0,1,-1", "0, -1, 1", True),
        ("2, 100", "100, 2", True), ("3, 120", "3120", False), (r"\{2,100\}", r"\{100, 2\}", True), ("1,000, 200", "200, 1000", True),
    ),
    "matrices": boxed(
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{2} \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{pmatrix}", True),
        (r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}", r"\begin{pmatrix} \frac13 \\ \frac23 \\ \frac53 \end{pmatrix}", False),
        (r"\begin{pmatrix} 0 & 0 \\ 0 & 0 \end{pmatrix}", r"\begin{pmatrix} 0 & 0 \\ 0 & 1 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\left[\begin{matrix}1 & 0\\0 & 1\end{matrix}\right]", True),
        (r"\begin{pmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \end{pmatrix}", r"\begin{pmatrix}1&2&3\\4&5&6\end{pmatrix}", True),
        (r"\begin{pmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\\5&6\end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\[2pt] 2 \end{bmatrix}", True),
        (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{vmatrix} 1 & 0 \\ 0 & 1 \end{vmatrix}", False),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"A = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", True),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "10", False), (r"\begin{pmatrix} 2 \\ 4 \end{pmatrix}", r"2\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix} \sqrt{2} \\ 1 \end{pmatrix}", r"\begin{pmatrix} \sqrt2 \\ 1 \\ \end{pmatrix}", True),
    ),
    "units": boxed(
        ("5", r"5\text{ cm}", True), ("5 \\text{ cm}", "5", True), ("5", "5 cm", True), (r"5\text{ cm}", r"5\text{ centimeters}", True),
        (r"5\text{ cm}", r"5\text{ m}", False), ("18", r"\$18", True), (r"\$18.90", "18.90", True), ("18", "18 dollars", True),
        ("18", r"18 \text{ dollars}", True), ("18", "18 apples", True), ("18", r"18\mathrm{~km}", True), ("30", r"30^\circ", True),
        (r"30^\circ", "30", True), (r"30^{\circ}", r"30^\circ", True), (r"90^\circ", r"\frac{\pi}{2}", False), ("30", "30°", True),
        ("12", r"12\text{ cm}^2", True), ("12", r"12\text{ square units}", True), ("5", "6 cm", False), (r"5.4 \text{ cents}", "5.4", True),
        (r"12\text{ cm}", r"12\text{ cm}^2", False), (r"12\text{ cm}^2", r"12\text{ cm}^3", False), (r"12\text{ cm}^2", r"12\text{ cm}", False),
        (r"12\text{ cm}^2", "12 cm^2", True), (r"12\text{ cm}^{2}", r"12\text{ square centimeters}", True), ("12 cm^3", r"12\text{ cubic cm}", True),
        (r"12\text{ cm}^2", "12 cm", False), (r"12\text{ cm}^2", "12", True), (r"12\text{ cm}^2", r"12\text{ sq. m}", False),
        (r"12\text{ cm}^2", r"12\text{ cm²}", True), (r"12\text{ m}^2", r"12\text{ m^3}", False), ("12 meters squared", r"12\text{ m}^2", True),
        (r"12\text{ cm}^2", r"12\text{ square units}", True), (r"12 \mathrm{cm}^2", r"12 \mathrm{~cm}^{2}", True), ("12 m²", "12 m³", False),
        ("10", r"10\text{ hours}", True), ("70000", r"\$70,000", True), ("70000", r"\$70,000.00", True), ("70000", "$70{,}000", True),
        ("64", "64 USD", True), ("2 \\text{ minutes}", r"2 \text{ hours}", False),
    ),
    "percentages": boxed(
        ("50", r"50\%", True), (r"50\%", "50", True), (r"50\%", "0.5", True), (r"50\%", r"\frac{1}{2}", True), ("0.5", r"50\%", True),
        (r"50\%", r"60\%", False), (r"50\%", "0.6", False), ("20", "20 %", True), ("20", "0.2", False), ("12.5", r"12.5\%", True),
        (r"25\%", "25 percent", True), (r"25\%", r"25\text{ percent}", True), (r"25\%", "2.5", False), (r"33\frac{1}{3}\%", r"\frac{1}{3}", True),
        (r"33\frac{1}{3}\%", r"33.\overline{3}\%", True), (r"150\%", "1.5", True), ("1.5", r"15\%", False), (r"-5\%", r"5\%", False), (r"7\%", r"7\,\%", True),
    ),
    "words": boxed(
        (r"\text{Evelyn}", "Evelyn", True), (r"\text{Evelyn}", r"\text{evelyn}", True), (r"\text{Evelyn}", r"\text{Carla}", False),
        (r"\text{even}", r"\textbf{even}", True), (r"\text{even}", "odd", False), (r"\text{(C)}", "C", True), (r"\text{(C)}", "(C)", True),
        (r"\text{(C)}", r"\text{C}", True), (r"\text{(C)}", "B", False), ("B", r"\textbf{(B)}\ 12", True), (r"\text{Yes}", "yes", True),
        (r"\text{June 20}", r"\text{June 20}", True), (r"\text{June 20}", r"\text{June 21}", False), (r"\text{navy}", "navy", True),
        ("4210_{5}", "4210_5", True), ("4210_{5}", "4210", True), ("4210_{5}", "4211_5", False), ("4210_{5}", "4210_6", False), (r"10:30", "10:30", True), ("10:30", "10:45", False),
    ),
    "spelling of LaTeX": boxed(
        ("x+y", r"x \; + \; y", True), ("(1,2)", r"\big(1,2\big)", True), ("5", r"\displaystyle 5", True), ("5", r"\mathbf{5}", True),
        ("5", r"\text{5}", True), ("5", r"\textbf{5}", True), (r"\frac{a}{b}", r"\frac ab", True), ("5", "{5}", True), ("5", "5.", True), ("5", " 5 ", True),
        ("x \\le 5", r"x \leq 5", True), (r"x \ge 5", "x ≥ 5", True), ("x < 5", "x > 5", False), ("x < 5", "5 > x", True), ("5", r"\left(5\right)", True),
        ("-1", r"-\!1", True), (r"\sqrt{2}", r"\sqrt2", True), (r"\sqrt[3]{2}", "2^{1/3}", True), ("2", r"\boxed{2}", True), ("5", r"\mathrm{5}", True),
    ),
    "text around the answer": [
        ("42", "The answer is 42.", True), ("42", "The answer is 42", True), ("42", "Answer: 42", True), ("42", "**Answer:** 42", True),
        ("42", "The final answer is $42$. I hope it is correct.", True), ("42", "So we get 6 * 7 = 42", True), ("42", "#### 42", True),
        ("42", "6*7=42\n#### 42\n", True), ("1234", "#### 1,234", True), ("42", "#### 43", False), ("42", "The answer is 43, not 42.", False),
        ("42", "Answer: 43", False), ("42", "It is 41, then 42 remain.", True), ("42", "42", True), ("-3", "The answer is -3.", True),
        ("3.5", "The answer is 3.5.", True), ("18", "She makes $18 every day.", True), ("1234", "In all $1,234 were paid.", True),
        ("42", "The answer is: $42$", True), ("42", r"Hence \[x = 42\]", True), ("42", r"Hence \(x = 42\).", True), ("42", "$$x = 42$$", True),
        ("42", "The answer is $x = 42$.", True), (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$.", True), (r"\frac{1}{2}", "The answer is 1/2.", True),
        ("(1,2)", "The answer is (1, 2).", True), (r"\text{Evelyn}", "The answer is Evelyn.", True), ("42", "The final answer is: **42**", True),
        ("42", "the answer is $42$ apples", True), ("50", "The answer is 50%.", True), ("7", "Der Wert ist 7", True),
        ("42", "First the answer is 40? No. The answer is 42.", True), ("42", "The answer is 42. Check: 6 * 7 = 42, and 5 + 5 = 10.", True),
        ("42", "#### Step 1\n6 * 7 = 42\n\n#### Step 2\nThe answer is 42.", True), ("42", "#### 42\n\n#### Explanation\nSix times 7.", True),
        ("7", "#### 1. Add\n3 + 4\n#### 2. Say it\nThe answer is 7.", True), ("42", "The answer is 42.\n#### 43\nThat is it.", False),
    ],
    "several boxes": [
        ("2", r"First $\boxed{1}$, but then $\boxed{2}$.", True), ("1", r"First $\boxed{1}$, but then $\boxed{2}$.", False),
        ("1,2", r"So $x = \boxed{1}$ or $x = \boxed{2}$.", False), ("1,2", r"So $\boxed{1}$ and $\boxed{2}$.", True), ("1,2", r"$\boxed{2}$, $\boxed{1}$", True),
        ("1", r"So $\boxed{1}$ and $\boxed{2}$.", False), ("2", r"So $\boxed{1}$ and $\boxed{2}$.", False), ("2", r"$\boxed{2}$ and again $\boxed{2}$", True),
        ("2", r"$\boxed{2}$, $\boxed{2}$", True), ("2", r"$\boxed{\boxed{2}}$", True), ("3", r"$\boxed{3}$ and $\boxed{}$", True), ("3", r"$\boxed{3}$ then \boxed{4", True),
        ("3", r"\fbox{3}", True), ("3", r"\boxed {3}", True), ("3", r"$\boxed{3}$ The answer is 4.", True), (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", True),
        (r"\{1\}", r"\boxed{\{1\}}", True),
    ],
    "none": [
        ("42", "", False), ("42", "   \n ", False), ("42", "I cannot solve this problem with what is given to me here.", False),
        ("42", r"\boxed{}", False), ("42", r"\boxed{", False), ("42", r"\boxed{42", True), ("42", "$$", False), ("42", "####", False), ("42", "???", False),
        ("42", "The answer is", False), ("0", "", False), (r"\text{none}", "", False),
        ("42", "I don't know.", False), ("42", r"The answer is \boxed{}.", False), ("42", ".", False), ("42", "漢字", False), ("42", "answer", False),
        ("42", "There are no real roots of this equation whatsoever, as shown above.", False),
    ],
}  # fmt: skip
