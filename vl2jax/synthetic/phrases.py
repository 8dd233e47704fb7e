"""Templates of questions and answers in English ("en") and Chinese ("zh").

All questions of a template have the same form of answer, so that scoring by exact match is fair.
"""

from vl2jax.synthetic.dice import Dice

LANGUAGES = ("en", "zh")
GROUNDED = "<|ref|>{name}<|/ref|><|det|>{boxes}<|/det|>"

# Key -> template of the answer, English questions, Chinese questions.  All questions of a language
# are equally frequent.
PHRASES = {
    "colour": (
        "{colour}",
        (
            "What colour is the {shape}?",
            "What is the colour of the {shape}?",
            "Which color does the {shape} have?",
        ),
        ("{shape}是什么颜色？", "图中的{shape}是什么颜色的？", "请说出{shape}的颜色。"),
    ),
    "shape": (
        "{shape}",
        (
            "What shape is {colour}?",
            "Which shape is {colour} in the image?",
            "What kind of shape is the {colour} one?",
        ),
        (
            "{colour}的是什么形状？",
            "图中{colour}的形状是哪一种？",
            "请说出{colour}的那个是什么形状。",
        ),
    ),
    "count_shape": (
        "{count}",
        (
            "How many {shapes} are there?",
            "How many {shapes} do you see?",
            "Count the {shapes} in the image.",
        ),
        ("有几个{shape}？", "图中有多少个{shape}？", "请数一数{shape}的个数。"),
    ),
    "count_colour": (
        "{count}",
        (
            "How many {colour} shapes are there?",
            "How many {colour} shapes do you see?",
            "Count the {colour} shapes in the image.",
        ),
        ("有几个{colour}的形状？", "图中有多少个{colour}的形状？", "请数一数{colour}形状的个数。"),
    ),
    "count_all": (
        "{count}",
        (
            "How many shapes are there?",
            "How many shapes do you see?",
            "Count all the shapes in the image.",
        ),
        ("有几个形状？", "图中一共有多少个形状？", "请数一数所有的形状。"),
    ),
    "digit": (
        "{text}",
        ("What digit is in the image?", "Which digit do you see?", "Read the digit."),
        ("图中的数字是几？", "你看到哪个数字？", "请读出数字。"),
    ),
    "number": (
        "{text}",
        ("What number is in the image?", "Which number do you see?", "Read the number."),
        ("图中的数是多少？", "你看到的数是多少？", "请读出这个数。"),
    ),
    "number_length": (
        "{count}",
        (
            "How many digits does the number have?",
            "How long is the number, in digits?",
            "Count the digits of the number.",
        ),
        ("这个数有几位？", "图中的数是几位数？", "请数一数这个数的位数。"),
    ),
    "word": (
        "{text}",
        ("What word is in the image?", "What does the text say?", "Read the word."),
        ("图中的单词是什么？", "图中写着什么？", "请读出单词。"),
    ),
    "word_letter": (
        "{letter}",
        (
            "What is the first letter of the word?",
            "Which letter does the word begin with?",
            "Name the first letter of the text.",
        ),
        ("单词的第一个字母是什么？", "图中的单词以哪个字母开头？", "请说出第一个字母。"),
    ),
    "word_meaning": (
        "{meaning}",
        (
            "What does the word in the image mean in Chinese?",
            "Translate the text in the image into Chinese.",
            "Give the Chinese for the word shown.",
        ),
        ("图中的单词是什么意思？", "请把图中的单词翻译成中文。", "图中的词用中文怎么说？"),
    ),
    "locate": (
        GROUNDED,
        (
            "Locate <|ref|>{name}<|/ref|> in the given image.",
            "<|ref|>{name}<|/ref|>",
            "Where is <|ref|>{name}<|/ref|>?",
        ),
        (
            "请找出图中的<|ref|>{name}<|/ref|>。",
            "在图中定位<|ref|>{name}<|/ref|>。",
            "<|ref|>{name}<|/ref|>在哪里？",
        ),
    ),
    "locate_all": (
        GROUNDED,
        (
            "Locate <|ref|>all {name}<|/ref|> in the given image.",
            "<|ref|>all {name}<|/ref|>",
            "Where are <|ref|>all {name}<|/ref|>?",
        ),
        (
            "请找出图中的<|ref|>所有{name}<|/ref|>。",
            "在图中定位<|ref|>所有{name}<|/ref|>。",
            "<|ref|>所有{name}<|/ref|>在哪里？",
        ),
    ),
    "quarter": (
        "{quarter}",
        (
            "Which quarter of the image is the {name} in?",
            "In which quarter do you see the {name}?",
            "Name the quarter of the {name}.",
        ),
        ("{name}在哪一块？", "图中{name}在哪个位置？", "请说出{name}所在的位置。"),
    ),
    "exists": (
        "{yes}",
        (
            "Is there {a_name} in the image?",
            "Do you see {a_name}?",
            "Does the image show {a_name}?",
        ),
        ("图中有{name}吗？", "你看到{name}了吗？", "图里是否有{name}？"),
    ),
    "relation": (
        "{yes}",
        (
            "Is the {first} {side} the {second}?",
            "Do you see the {first} {side} the {second}?",
            "The {first} is {side} the {second}, is that true?",
        ),
        (
            "{first}在{second}的{side}吗？",
            "图中{first}是在{second}的{side}吗？",
            "{first}位于{second}的{side}，对吗？",
        ),
    ),
    "compare": (
        "{name}",
        (
            "Which is {larger}, the {first} or the {second}?",
            "What is {larger}: the {first} or the {second}?",
            "Compare the {first} and the {second}: which one is {larger}?",
        ),
        (
            "{first}和{second}哪个更{larger}？",
            "哪个更{larger}，{first}还是{second}？",
            "比较{first}和{second}，更{larger}的是哪个？",
        ),
    ),
    "caption": (
        "{caption}",
        ("Describe the image.", "What do you see from left to right?", "What is in this picture?"),
        ("请描述这张图。", "从左到右有什么？", "这张图里有什么？"),
    ),
    "grounded_caption": (
        "{caption}",
        (
            "<|grounding|>Can you describe the content of the image?",
            "<|grounding|>Describe the image from left to right.",
            "<|grounding|>What is in this picture?",
        ),
        (
            "<|grounding|>你能描述图中的内容吗？",
            "<|grounding|>请从左到右描述这张图。",
            "<|grounding|>这张图里有什么？",
        ),
    ),
    "chart_most": (
        "{colour}",
        (
            "Which bar is the {most}?",
            "What colour is the {most} bar?",
            "Name the colour of the {most} bar in the chart.",
        ),
        ("哪根柱子最{most}？", "最{most}的柱子是什么颜色？", "请说出图表中最{most}的柱子的颜色。"),
    ),
    "chart_value": (
        "{count}",
        (
            "What is the value of the {colour} bar?",
            "How high is the {colour} bar?",
            "Read the value of the {colour} bar from the chart.",
        ),
        ("{colour}柱子的值是多少？", "{colour}柱子有多高？", "请读出{colour}柱子的数值。"),
    ),
    "chart_count": (
        "{count}",
        ("How many bars are there?", "How many bars does the chart have?", "Count the bars."),
        ("有几根柱子？", "图表中有多少根柱子？", "请数一数柱子。"),
    ),
    "in_context": (
        GROUNDED,
        (
            "<|grounding|>In the first image, an object within the red rectangle is marked."
            " Locate the object of the same category in the second image.",
            "<|grounding|>The red rectangle in the first image marks an object."
            " Find the same kind of object in the second image.",
            "<|grounding|>What is marked in the first image? Locate it in the second image.",
        ),
        (
            "<|grounding|>第一张图中红框标出了一个物体，请在第二张图中找出同类物体。",
            "<|grounding|>请在第二张图中定位第一张图红框里的那种物体。",
            "<|grounding|>第一张图红框里是什么？请在第二张图中找到它。",
        ),
    ),
    "which_image": (
        "{image}",
        (
            "Which image shows {a_name}?",
            "In which image is there {a_name}?",
            "Name the image that has {a_name}.",
        ),
        ("哪张图里有{name}？", "{name}在哪张图里？", "请指出有{name}的图。"),
    ),
    "to_chinese": (
        "{meaning}",
        (
            'What is "{word}" in Chinese?',
            'Translate "{word}" into Chinese.',
            'How do you say "{word}" in Chinese?',
        ),
        ("“{word}”是什么意思？", "请把“{word}”翻译成中文。", "“{word}”用中文怎么说？"),
    ),
    "to_english": (
        "{word}",
        (
            'What is "{meaning}" in English?',
            'Translate "{meaning}" into English.',
            'How do you say "{meaning}" in English?',
        ),
        ("“{meaning}”的英文是什么？", "请把“{meaning}”翻译成英文。", "“{meaning}”用英文怎么说？"),
    ),
    "sum": (
        "{c}",
        ("What is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}."),
        ("{a}加{b}等于几？", "{a} + {b} 是多少？", "请计算{a}加{b}。"),
    ),
    "opposite": (
        "{b}",
        (
            'What is the opposite of "{a}"?',
            'Name the opposite of "{a}".',
            'Which word means the opposite of "{a}"?',
        ),
        ("“{a}”的反义词是什么？", "请说出“{a}”的反义词。", "和“{a}”意思相反的词是什么？"),
    ),
    "next_letter": (
        "{b}",
        (
            'Which letter comes after "{a}"?',
            'What letter follows "{a}" in the alphabet?',
            'Name the letter after "{a}".',
        ),
        (
            "字母“{a}”后面是哪个字母？",
            "字母表中“{a}”的下一个字母是什么？",
            "请说出“{a}”之后的字母。",
        ),
    ),
}

# The answer to every question about something that the image does not show.
ABSENT = {"en": "There is no {name} in the image.", "zh": "图中没有{name}。"}
YES = {"en": ("no", "yes"), "zh": ("否", "是")}
QUARTERS = {  # indexed by [bottom half][right half]
    "en": (("top left", "top right"), ("bottom left", "bottom right")),
    "zh": (("左上", "右上"), ("左下", "右下")),
}
SIDES = {
    "en": ("to the left of", "to the right of", "above", "below"),
    "zh": ("左边", "右边", "上面", "下面"),
}


def phrase(dice: Dice, key: str, language: str, **fields: object) -> tuple[str, str]:
    """Fills a random question template of `key` and its answer template.

    Args:
      dice: random generator.
      key: key of `PHRASES`.
      language: "en" or "zh".
      fields: values of the placeholders.

    Returns:
      The question and the answer.
    """
    answer, *questions = PHRASES[key]
    question = dice.pick(questions[LANGUAGES.index(language)])
    return question.format(**fields), answer.format(**fields)


def question_only(dice: Dice, key: str, language: str, **fields: object) -> str:
    """Fills a random question template of `key`; the caller makes the answer."""
    return dice.pick(PHRASES[key][1 + LANGUAGES.index(language)]).format(**fields)


def box_list(boxes: list[tuple[int, int, int, int]]) -> str:
    """Formats boxes as the model writes them: `[[1, 2, 3, 4], [5, 6, 7, 8]]`."""
    return str([list(box) for box in boxes])
