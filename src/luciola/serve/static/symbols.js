// TeX's names of symbols, functions, spaces, accents and alphabets, for maths.js.

/** "name character name character ..." -> {name: character} */
function pairs(text) {
  const words = text.trim().split(/\s+/);
  return Object.fromEntries(words.flatMap((word, i) => (i % 2 ? [] : [[word, words[i + 1]]])));
}

export const SYMBOLS = {
  ...pairs(`alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ
    nu ν xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω
    Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω`),
  ...pairs(`ell ℓ hbar ℏ imath ı jmath ȷ Re ℜ Im ℑ aleph ℵ beth ℶ partial ∂ nabla ∇ infty ∞ emptyset ∅ varnothing ∅ forall ∀
    exists ∃ nexists ∄ neg ¬ lnot ¬ top ⊤ bot ⊥ angle ∠ measuredangle ∡ triangle △ square □ blacksquare ■ Box □ qed ∎ checkmark ✓
    prime ′ degree ° circ ∘ bullet ∙ star ⋆ ast ∗ dagger † ddagger ‡ S § P ¶ pounds £ copyright © surd √ flat ♭ sharp ♯
    natural ♮ clubsuit ♣ diamondsuit ♢ heartsuit ♡ spadesuit ♠ ldots … dots … dotsc … dotsb ⋯ dotsm ⋯ dotsi ⋯ cdots ⋯ vdots ⋮ ddots ⋱
    colon : mid ∣ nmid ∤ vert | lvert | rvert | Vert ‖ lVert ‖ rVert ‖ | ‖ backslash \\ lbrace { rbrace } lbrack [ rbrack ]
    langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉`),
  ...pairs(`pm ± mp ∓ times × div ÷ cdot ⋅ cap ∩ cup ∪ uplus ⊎ sqcap ⊓ sqcup ⊔ vee ∨ lor ∨ wedge ∧ land ∧ setminus ∖ wr ≀
    oplus ⊕ ominus ⊖ otimes ⊗ oslash ⊘ odot ⊙ diamond ⋄ bigtriangleup △ bigtriangledown ▽ ltimes ⋉ rtimes ⋊ amalg ⨿`),
  ...pairs(`le ≤ leq ≤ ge ≥ geq ≥ leqslant ⩽ geqslant ⩾ lt < gt > ne ≠ neq ≠ equiv ≡ approx ≈ approxeq ≊ cong ≅ sim ∼ simeq ≃
    propto ∝ asymp ≍ doteq ≐ triangleq ≜ coloneqq ≔ ll ≪ gg ≫ prec ≺ succ ≻ preceq ⪯ succeq ⪰ in ∈ notin ∉ ni ∋ subset ⊂ supset ⊃
    subseteq ⊆ supseteq ⊇ subsetneq ⊊ supsetneq ⊋ nsubseteq ⊈ sqsubseteq ⊑ sqsupseteq ⊒ perp ⊥ parallel ∥ nparallel ∦ vdash ⊢
    dashv ⊣ models ⊨ vDash ⊨ bowtie ⋈ smile ⌣ frown ⌢ lesssim ≲ gtrsim ≳ nless ≮ ngtr ≯ nleq ≰ ngeq ≱`),
  ...pairs(`to → rightarrow → leftarrow ← gets ← uparrow ↑ downarrow ↓ updownarrow ↕ leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐
    Uparrow ⇑ Downarrow ⇓ Leftrightarrow ⇔ implies ⟹ impliedby ⟸ iff ⟺ mapsto ↦ longmapsto ⟼ longrightarrow ⟶ longleftarrow ⟵
    longleftrightarrow ⟷ Longrightarrow ⟹ Longleftarrow ⟸ Longleftrightarrow ⟺ hookrightarrow ↪ hookleftarrow ↩ nearrow ↗ searrow ↘
    swarrow ↙ nwarrow ↖ rightharpoonup ⇀ leftharpoonup ↼ rightleftharpoons ⇌ leadsto ⇝ twoheadrightarrow ↠ circlearrowright ↻
    therefore ∴ because ∵`),
};

export const BIG = pairs(`sum ∑ prod ∏ coprod ∐ int ∫ iint ∬ iiint ∭ oint ∮ bigcap ⋂ bigcup ⋃ bigvee ⋁ bigwedge ⋀ bigoplus ⨁
  bigotimes ⨂ bigodot ⨀ bigsqcup ⨆`);

export const FUNCTIONS = new Set(
  ("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arg exp ln log lg lim limsup liminf max min sup inf argmax " +
    "argmin det dim gcd lcm ker hom deg Pr").split(" "),
);

/** Whose limits stand below and above, in display style. */
export const UNDEROVER = new Set(
  [...Object.keys(BIG).filter((name) => !name.includes("int")), ..."lim limsup liminf max min sup inf argmax argmin det gcd Pr".split(" ")].map((name) => "\\" + name),
);

export const SPACES = { ",": "0.17em", ":": "0.22em", ">": "0.22em", ";": "0.28em", "!": "-0.17em", " ": "0.3em", "\n": "0.3em", quad: "1em", qquad: "2em", enspace: "0.5em", thinspace: "0.17em" };

/** name: [character, below?, stretchy?] */
export const ACCENTS = {
  hat: ["^", false, false], widehat: ["^", false, true], bar: ["¯", false, false], overline: ["‾", false, true], vec: ["→", false, false],
  overrightarrow: ["→", false, true], overleftarrow: ["←", false, true], dot: ["˙", false, false], ddot: ["¨", false, false],
  tilde: ["~", false, false], widetilde: ["~", false, true], check: ["ˇ", false, false], breve: ["˘", false, false], acute: ["´", false, false],
  grave: ["`", false, false], mathring: ["˚", false, false], underline: ["_", true, true], overbrace: ["⏞", false, true], underbrace: ["⏟", true, true],
};

/** Letters moved to one of Unicode's alphabets for maths; those that came to Unicode earlier have places of their own. */
function alphabet(upper, lower, digit, exceptions = {}) {
  return (letter) => {
    if (exceptions[letter]) return exceptions[letter];
    const code = letter.codePointAt(0);
    if (upper && code >= 65 && code <= 90) return String.fromCodePoint(upper + code - 65);
    if (lower && code >= 97 && code <= 122) return String.fromCodePoint(lower + code - 97);
    if (digit && code >= 48 && code <= 57) return String.fromCodePoint(digit + code - 48);
    return letter;
  };
}

const bold = alphabet(0x1d400, 0x1d41a, 0x1d7ce);
const double = alphabet(0x1d538, 0x1d552, 0x1d7d8, pairs("C ℂ H ℍ N ℕ P ℙ Q ℚ R ℝ Z ℤ"));
const script = alphabet(0x1d49c, 0x1d4b6, 0, pairs("B ℬ E ℰ F ℱ H ℋ I ℐ L ℒ M ℳ R ℛ e ℯ g ℊ o ℴ"));
const fraktur = alphabet(0x1d504, 0x1d51e, 0, pairs("C ℭ H ℌ I ℑ R ℜ Z ℨ"));
const upright = (letter) => letter;

export const ALPHABETS = {
  mathbb: double, mathbf: bold, boldsymbol: bold, bm: bold, mathcal: script, mathscr: script, mathfrak: fraktur, mathrm: upright, mathit: upright,
  mathsf: alphabet(0x1d5a0, 0x1d5ba, 0x1d7e2), mathtt: alphabet(0x1d670, 0x1d68a, 0x1d7f6),
};
