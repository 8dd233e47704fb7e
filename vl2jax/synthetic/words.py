"""Names in English and Chinese: colours, shapes, and several hundred short words."""

# Name -> Chinese, and the mean RGB of its shades; the colours are easy to tell apart.
COLOURS = {
    "red": ("红色", (220, 30, 35)),
    "green": ("绿色", (25, 145, 45)),
    "blue": ("蓝色", (35, 65, 220)),
    "yellow": ("黄色", (240, 210, 20)),
    "purple": ("紫色", (140, 40, 170)),
    "orange": ("橙色", (245, 130, 20)),
    "black": ("黑色", (25, 25, 28)),
    "cyan": ("青色", (35, 200, 215)),
}
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字形",
    "diamond": "菱形",
}
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# Pairs that the train split never has; it has each of their colours and shapes in other pairs.
HELD_OUT = (
    *(("red", "circle"), ("green", "star"), ("blue", "triangle"), ("yellow", "cross")),
    *(("purple", "diamond"), ("orange", "square"), ("black", "circle"), ("cyan", "triangle")),
)

# English words and their Chinese; each is unique, so that translation is unambiguous.
_WORDS = """
cat猫 dog狗 pig猪 cow奶牛 hen母鸡 duck鸭子 goat山羊 sheep绵羊 horse马 mouse老鼠 rat大鼠 bear熊
wolf狼 fox狐狸 lion狮子 tiger老虎 zebra斑马 panda熊猫 camel骆驼 deer鹿 frog青蛙 snake蛇 fish鱼
shark鲨鱼 whale鲸鱼 seal海豹 crab螃蟹 bee蜜蜂 ant蚂蚁 fly苍蝇 moth飞蛾 bird鸟 eagle老鹰 owl猫头鹰
crow乌鸦 swan天鹅 goose鹅 hawk鹰 apple苹果 pear梨 peach桃子 plum李子 grape葡萄 lemon柠檬 mango芒果
melon甜瓜 fig无花果 nut坚果 corn玉米 bean豆子 pea豌豆 rice米饭 bread面包 cake蛋糕 pie馅饼 egg鸡蛋
meat肉 beef牛肉 pork猪肉 ham火腿 soup汤 salad沙拉 sugar糖 salt盐 oil油 milk牛奶 tea茶 juice果汁
water水 wine葡萄酒 beer啤酒 honey蜂蜜 jam果酱 onion洋葱 pizza披萨 cup杯子 bowl碗 plate盘子 fork叉子
knife刀 spoon勺子 pot锅 pan平底锅 glass玻璃 box盒子 bag袋子 desk书桌 table桌子 chair椅子 bed床
sofa沙发 lamp台灯 clock时钟 watch手表 door门 wall墙 floor地板 roof屋顶 room房间 house房子 home家
key钥匙 lock锁 book书 page页 paper纸 pen钢笔 ink墨水 ruler尺子 map地图 ball球 doll娃娃 toy玩具
game游戏 card卡片 drum鼓 piano钢琴 flute笛子 song歌曲 music音乐 radio收音机 phone电话 robot机器人
car汽车 bus公共汽车 truck卡车 train火车 bike自行车 boat小船 ship轮船 plane飞机 road路 wheel轮子
coat外套 shirt衬衫 dress连衣裙 skirt裙子 hat帽子 cap便帽 shoe鞋 boot靴子 sock袜子 belt皮带
glove手套 scarf围巾 ring戒指 crown王冠 sun太阳 moon月亮 earth地球 sky天空 cloud云 rain雨 snow雪
wind风 storm暴风雨 ice冰 fire火 smoke烟 sand沙子 stone石头 rock岩石 gold金子 iron铁 wood木头 tree树
leaf叶子 root根 grass草 seed种子 rose玫瑰 lily百合 park公园 farm农场 field田野 hill小山 river河
lake湖 sea海 ocean大洋 beach海滩 wave波浪 city城市 town城镇 shop商店 bank银行 hotel旅馆 tower塔
man男人 woman女人 boy男孩 girl女孩 baby婴儿 king国王 queen女王 child孩子 uncle叔叔 aunt阿姨 son儿子
nurse护士 cook厨师 judge法官 pilot飞行员 head头 hair头发 face脸 eye眼睛 ear耳朵 nose鼻子 mouth嘴
tooth牙齿 neck脖子 arm手臂 hand手 leg腿 foot脚 knee膝盖 back背 heart心 blood血 bone骨头 big大
small小 long长 short短 tall高 high高处 low低 hot热 cold冷 warm温暖 cool凉爽 new新 old旧 young年轻
good好 bad坏 fast快 slow慢 hard硬 soft软 wet湿 dry干 full满 empty空 rich富 poor穷 clean干净 dirty脏
light光 dark暗 heavy重 thin薄 thick厚 wide宽 deep深 open打开 close关闭 happy快乐 sad悲伤 angry生气
tired累 brave勇敢 quiet安静 loud响亮 sweet甜 sour酸 early早 late晚 left左 right右 up上 down下
near近 far远 day白天 night夜晚 noon中午 hour小时 week星期 month月份 year年 today今天 go去 come来
run跑 walk走 jump跳 swim游泳 sing唱歌 dance跳舞 read读 write写 draw画 speak说 hear听见 see看见
eat吃 drink喝 sleep睡觉 play玩 work工作 study学习 think想 buy买 sell卖 give给 take拿 push推 pull拉
cut切 wash洗 help帮助 love爱 hate恨 laugh笑 cry哭 smile微笑 dream梦 begin开始 end结束 stop停 wait等
win赢 lose输 find找到 send送 bring带来 learn学会 teach教 ask问 tell告诉 know知道 live住 die死
zero零 one一 two二 three三 four四 five五 six六 seven七 eight八 nine九 ten十 white白色 pink粉色
brown棕色 gray灰色 line线 point点 dot圆点 north北 south南 east东 west西 front前 money钱 coin硬币
price价格 art艺术 film电影 story故事 news新闻 name名字 word词 test考试 class班级 math数学 gift礼物
party聚会 team团队 sport运动 race赛跑 prize奖品 peace和平 war战争 law法律 army军队 flag旗 gun枪
sword剑 ghost鬼 giant巨人 magic魔法 bell铃 rope绳子 nail钉子 saw锯子 tool工具 brush刷子 soap肥皂
towel毛巾 sheet床单 tent帐篷 stick棍子 wire电线 tape胶带 glue胶水 basin盆
"""


def _read_words() -> dict[str, str]:
    found = {}
    for entry in _WORDS.split():
        english = entry.rstrip("".join(set(entry) - set("abcdefghijklmnopqrstuvwxyz")))
        found[english] = entry[len(english) :]
    return found


WORDS = _read_words()
SHORT_WORDS = tuple(word for word in WORDS if 3 <= len(word) <= 5)
_OPPOSITES = """
big-small long-short high-low hot-cold warm-cool new-old good-bad fast-slow hard-soft wet-dry
full-empty rich-poor clean-dirty light-dark thin-thick open-close happy-sad quiet-loud sweet-sour
early-late left-right up-down near-far day-night go-come buy-sell give-take push-pull love-hate
laugh-cry begin-end win-lose north-south east-west front-back peace-war ask-tell
"""
OPPOSITES = tuple(tuple(pair.split("-")) for pair in _OPPOSITES.split())


def pair_name(colour: str, shape: str, language: str) -> str:
    """Returns the name of a coloured shape: "red circle", "红色的圆形"."""
    if language == "zh":
        return f"{COLOURS[colour][0]}的{SHAPES[shape]}"
    return f"{colour} {shape}"


def colour_name(colour: str, language: str) -> str:
    """Returns the name of a colour: "red", "红色"."""
    return COLOURS[colour][0] if language == "zh" else colour


def shape_name(shape: str, language: str, *, plural: bool = False) -> str:
    """Returns the name of a shape: "circle" or "circles", "圆形"."""
    if language == "zh":
        return SHAPES[shape]
    return shape + ("" if not plural else "es" if shape.endswith("s") else "s")


def with_article(name: str) -> str:
    """Returns an English noun with "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
